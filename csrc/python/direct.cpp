// Repeated calls of a public op without its Python: tilefuse._direct, an extension module in Python's limited API.
//
// A `Replay` stands in front of the op's Python function. What the function does with a call follows from the call's
// key: shapes, strides and dtypes of its tensors, which of them are one object, its plain values and, where the op
// writes, the distances between tensors whose memory meets. The second call of a key is recorded (python/tilefuse/
// direct.py): if all that the function did was to look at the key and to call one kernel of the CPU library, the plan
// says with which arguments and what it returned, and calls of that key repeat it. Any other call is the function's,
// and so is one that is not plain: gradients, modes, transforms, tracing, autocast, profiling, subclasses, other
// devices.
//
// The kernel is called through torch's dispatcher. Two facts of torch are no part of its stable ABI: a tensor's Python
// object holds the C++ tensor behind its header, and THPVariable_Wrap makes one. `setup` checks both and raises
// ImportError where they do not hold.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <unordered_map>

#include "common/host.h"

namespace at {
class TensorBase;
}
PyObject* THPVariable_Wrap(const at::TensorBase&);

namespace tilefuse {

namespace {

// words of a key, tensors and arguments of a call: larger calls are the function's
constexpr int kMostWords = 512;
constexpr int kMostTensors = 32;
constexpr int kMostArguments = 64;
// keys of an op: when they are more, all are forgotten
constexpr size_t kMostKeys = 1024;
// an op of which so many keys in a row had no plan is left to Python
constexpr int kMostFailures = 64;

// what `setup` was given
struct Torch {
  PyObject *tensor, *parameter, *dtype;  // types
  PyObject* requires_gradient;           // the descriptor, and what reads it
  descrgetfunc read;
  PyObject* modes;  // functions that return something true where a call is not plain
  PyObject *gradients_enabled, *increment_version;
  PyObject *forward_ad, *backends;              // dicts of modules
  PyObject *is_inference, *level, *generation;  // names
};
Torch torch_{};

AtenTensorHandle handle_of(PyObject* tensor) {
  return reinterpret_cast<AtenTensorHandle>(reinterpret_cast<char*>(tensor) + sizeof(PyObject));
}

PyObject* wrapped(AtenTensorHandle handle) {
  return THPVariable_Wrap(*reinterpret_cast<const at::TensorBase*>(handle));
}

// one value of a key is a tag and what follows from it alone
enum Tag : uint64_t { kNone, kFalse, kTrue, kInt, kFloat, kString, kDtype, kTuple, kList, kTensor, kSame, kName };

// bytes of memory from the first to the last element
struct Extent {
  int64_t begin, end;
};

struct Call {
  int words = 0, tensors = 0;
  PyObject* tensor[kMostTensors];
  Extent extent[kMostTensors];
  uint64_t key[kMostWords];

  bool put(uint64_t word) {
    if (words == kMostWords) return false;
    key[words++] = word;
    return true;
  }

  uint64_t hash() const {
    uint64_t h = 0;
    for (int i = 0; i < words; ++i) {
      h = (h ^ key[i]) * 0x9e3779b97f4a7c15u;
      h ^= h >> 32;
    }
    return h;
  }
};

// 1 and 0 as truth, -1 with an exception
int truth(PyObject* owned) {
  if (owned == nullptr) return -1;
  const int answer = PyObject_IsTrue(owned);
  Py_DECREF(owned);
  return answer;
}

// The readers of values return 1, 0 for what no key holds, or -1 with an exception.

int read_int(Call& call, PyObject* value) {
  int overflow = 0;
  const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
  return overflow == 0 && call.put(kInt) && call.put(static_cast<uint64_t>(number));
}

int read_string(Call& call, PyObject* value, Tag tag) {
  Py_ssize_t length = 0;
  const char* text = PyUnicode_AsUTF8AndSize(value, &length);
  if (text == nullptr) return -1;
  if (!call.put(tag | static_cast<uint64_t>(length) << 8)) return 0;
  for (Py_ssize_t i = 0; i < length; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, text + i, static_cast<size_t>(std::min<Py_ssize_t>(8, length - i)));
    if (!call.put(word)) return 0;
  }
  return 1;
}

int read_tensor(Call& call, PyObject* value, bool gradients, bool writes) {
  for (int i = 0; i < call.tensors; ++i) {
    if (call.tensor[i] == value) return call.put(kSame | static_cast<uint64_t>(i) << 8);
  }
  if (call.tensors == kMostTensors) return 0;
  if (gradients) {
    const int needed = truth(torch_.read(torch_.requires_gradient, value, torch_.tensor));
    if (needed != 0) return needed < 0 ? -1 : 0;
  }
  const AtenTensorHandle handle = handle_of(value);
  static const int32_t cpu = aoti_torch_device_type_cpu(), strided = aoti_torch_layout_strided();
  int32_t device = 0, layout = 0, dtype = 0;
  int64_t dims = 0, *sizes = nullptr, *strides = nullptr;
  const void* data = nullptr;
  // the pointer is refused for tensors that stand for others
  if (aoti_torch_get_device_type(handle, &device) || device != cpu || aoti_torch_get_layout(handle, &layout) ||
      layout != strided || aoti_torch_get_dtype(handle, &dtype) || aoti_torch_get_dim(handle, &dims) ||
      aoti_torch_get_sizes(handle, &sizes) || aoti_torch_get_strides(handle, &strides) ||
      torch_get_const_data_ptr(handle, &data)) {
    return 0;
  }
  if (call.words + 1 + 2 * dims > kMostWords) return 0;
  call.put(kTensor | static_cast<uint64_t>(dims) << 8 | static_cast<uint64_t>(dtype) << 32);
  int64_t reach = 0;
  bool empty = false;
  for (int64_t i = 0; i < dims; ++i) {
    call.put(static_cast<uint64_t>(sizes[i]));
    call.put(static_cast<uint64_t>(strides[i]));
    reach += (sizes[i] - 1) * strides[i];
    empty = empty || sizes[i] == 0;
  }
  // zeros that have no memory
  if (data == nullptr && !empty) return 0;
  if (writes) {
    const int64_t begin = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
    const int64_t bytes = (reach + 1) * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
    call.extent[call.tensors] = {begin, empty ? begin : begin + bytes};
  }
  call.tensor[call.tensors++] = value;
  return 1;
}

int read_items(Call& call, PyObject* value, bool tuple) {
  const Py_ssize_t n = tuple ? PyTuple_Size(value) : PyList_Size(value);
  if (!call.put((tuple ? kTuple : kList) | static_cast<uint64_t>(n) << 8)) return 0;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* item = tuple ? PyTuple_GetItem(value, i) : PyList_GetItem(value, i);
    if (Py_TYPE(item) != &PyLong_Type) return 0;
    const int read = read_int(call, item);
    if (read != 1) return read;
  }
  return 1;
}

// exact types only: a subclass may behave in another way
int read_value(Call& call, PyObject* value, bool gradients, bool writes) {
  PyTypeObject* type = Py_TYPE(value);
  if (type == reinterpret_cast<PyTypeObject*>(torch_.tensor) ||
      type == reinterpret_cast<PyTypeObject*>(torch_.parameter)) {
    return read_tensor(call, value, gradients, writes);
  }
  if (value == Py_None) return call.put(kNone);
  if (value == Py_False) return call.put(kFalse);
  if (value == Py_True) return call.put(kTrue);
  if (type == &PyLong_Type) return read_int(call, value);
  if (type == &PyUnicode_Type) return read_string(call, value, kString);
  if (type == &PyFloat_Type) {
    const double number = PyFloat_AsDouble(value);
    uint64_t word = 0;
    std::memcpy(&word, &number, sizeof(word));
    return call.put(kFloat) && call.put(word);
  }
  // each dtype is one object for good
  if (type == reinterpret_cast<PyTypeObject*>(torch_.dtype)) {
    return call.put(kDtype) && call.put(static_cast<uint64_t>(reinterpret_cast<uintptr_t>(value)));
  }
  if (type == &PyTuple_Type || type == &PyList_Type) return read_items(call, value, type == &PyTuple_Type);
  return 0;
}

// where the memory of two tensors meets, their distance; what they share depends on nothing else that is not in the key
bool put_distances(Call& call) {
  for (int i = 1; i < call.tensors; ++i) {
    for (int j = 0; j < i; ++j) {
      const Extent &a = call.extent[i], &b = call.extent[j];
      if (a.begin >= b.end || b.begin >= a.end) continue;
      if (!call.put(kSame | static_cast<uint64_t>(i) << 8 | static_cast<uint64_t>(j) << 16) ||
          !call.put(static_cast<uint64_t>(a.begin - b.begin))) {
        return false;
      }
    }
  }
  return true;
}

// An argument of a kernel or an item of what the function returns: a tensor of the call, a plain value, an output.
struct Item {
  char code;
  int64_t integer = 0;
  double number = 0;
  std::string text{};
  std::vector<int64_t> list{};
};

// What repeats a call.
struct Plan {
  std::string kernel;
  std::vector<Item> arguments;
  int outputs;
  bool tuple;  // of results; otherwise there is one
  std::vector<Item> results;
  std::vector<int> written;  // tensors of the call
};

// A key that was called: once without a plan, then with one or refused for good.
struct Entry {
  std::vector<uint64_t> key;
  bool refused = false;
  std::shared_ptr<const Plan> plan{};

  bool of(const Call& call) const {
    return key.size() == static_cast<size_t>(call.words) && std::equal(key.begin(), key.end(), call.key);
  }
};

// What a Replay holds. Only who holds the GIL touches it.
struct Op {
  PyObject *function, *record;
  bool writes;
  long generation = -1;
  int failures = 0;
  long long repeated = 0;
  std::unordered_map<uint64_t, Entry> entries{};
};

struct Replay {
  PyObject_HEAD Op* op;
};

Op& op_of(PyObject* self) { return *reinterpret_cast<Replay*>(self)->op; }

bool read_number(PyObject* dict, PyObject* name, long& number) {
  PyObject* value = PyDict_GetItemWithError(dict, name);
  if (value == nullptr) {
    if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, name);
    return false;
  }
  number = PyLong_AsLong(value);
  return number != -1 || !PyErr_Occurred();
}

// Fills the key of a call: 1, 0 if the call is not plain, -1 with an exception.
int read_call(Op& op, Call& call, PyObject* args, PyObject* kwargs) {
  const Py_ssize_t modes = PyTuple_Size(torch_.modes);
  for (Py_ssize_t i = 0; i < modes; ++i) {
    const int on = truth(PyObject_CallNoArgs(PyTuple_GetItem(torch_.modes, i)));
    if (on != 0) return on < 0 ? -1 : 0;
  }
  long level = 0, generation = 0;
  if (!read_number(torch_.forward_ad, torch_.level, level)) return -1;
  if (level >= 0) return 0;
  if (!read_number(torch_.backends, torch_.generation, generation)) return -1;
  if (generation != op.generation) {
    op.entries.clear();
    op.failures = 0;
    op.generation = generation;
  }
  if (op.failures >= kMostFailures) return 0;
  const int gradients = truth(PyObject_CallNoArgs(torch_.gradients_enabled));
  if (gradients < 0) return -1;
  const Py_ssize_t positional = PyTuple_Size(args);
  for (Py_ssize_t i = 0; i < positional; ++i) {
    const int read = read_value(call, PyTuple_GetItem(args, i), gradients, op.writes);
    if (read != 1) return read;
  }
  if (kwargs != nullptr) {
    PyObject *name = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(kwargs, &at, &name, &value);) {
      int read = read_string(call, name, kName);
      if (read == 1) read = read_value(call, value, gradients, op.writes);
      if (read != 1) return read;
    }
  }
  return !op.writes || put_distances(call);
}

bool read_items(PyObject* tuple, std::vector<Item>& items) {
  for (Py_ssize_t i = 0; i < PyTuple_Size(tuple); ++i) {
    const char* code = nullptr;
    PyObject* value = nullptr;
    if (!PyArg_ParseTuple(PyTuple_GetItem(tuple, i), "sO", &code, &value)) return false;
    Item item{*code};
    switch (item.code) {
      case 'f':
        item.number = PyFloat_AsDouble(value);
        break;
      case 's': {
        const char* text = PyUnicode_AsUTF8AndSize(value, nullptr);
        if (text != nullptr) item.text = text;
        break;
      }
      case 'l':
        for (Py_ssize_t j = 0; j < PyTuple_Size(value); ++j) {
          item.list.push_back(PyLong_AsLongLong(PyTuple_GetItem(value, j)));
        }
        break;
      case 'd': {
        int32_t dtype = 0;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle_of(value), &dtype));
        item.integer = dtype;
        break;
      }
      default:
        item.integer = PyLong_AsLongLong(value);
    }
    if (PyErr_Occurred()) return false;
    items.push_back(std::move(item));
  }
  return true;
}

// of the tuple that the recorder made; null with an exception, or where a call has too many arguments
std::shared_ptr<const Plan> plan_of(PyObject* made) {
  auto plan = std::make_shared<Plan>();
  const char* kernel = nullptr;
  PyObject *arguments = nullptr, *results = nullptr, *written = nullptr;
  int tuple = 0;
  if (!PyArg_ParseTuple(made, "sO!iO!pO!", &kernel, &PyTuple_Type, &arguments, &plan->outputs, &PyTuple_Type, &results,
                        &tuple, &PyTuple_Type, &written) ||
      !read_items(arguments, plan->arguments) || !read_items(results, plan->results)) {
    return nullptr;
  }
  plan->kernel = kernel;
  plan->tuple = tuple != 0;
  for (Py_ssize_t i = 0; i < PyTuple_Size(written); ++i) {
    plan->written.push_back(static_cast<int>(PyLong_AsLong(PyTuple_GetItem(written, i))));
  }
  const auto fits = [](size_t count) { return count <= static_cast<size_t>(kMostArguments); };
  if (PyErr_Occurred() || !fits(plan->arguments.size()) || !fits(static_cast<size_t>(plan->outputs))) return nullptr;
  return plan;
}

template <typename T>
StableIValue boxed(const T& value) {
  return torch::stable::detail::from(value);
}

StableIValue argument_of(const Item& item, const Call& call) {
  switch (item.code) {
    case 't':
    case 'o': {
      AtenTensorHandle handle = nullptr;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_of(call.tensor[item.integer]), &handle));
      return item.code == 't' ? boxed(handle) : boxed(std::optional<AtenTensorHandle>(handle));
    }
    case 'i':
      return boxed(item.integer);
    case 'b':
      return boxed(item.integer != 0);
    case 'f':
      return boxed(item.number);
    case 's':
      return boxed(item.text);
    case 'l':
      return boxed(std::optional<std::vector<int64_t>>(item.list));
    case 'd':
      return boxed(static_cast<ScalarType>(item.integer));
    default:
      return boxed(std::nullopt);
  }
}

PyObject* result_of(const Item& item, const Call& call, AtenTensorHandle const* outputs) {
  if (item.code == 'k') return wrapped(outputs[item.integer]);
  PyObject* value = item.code == 't' ? call.tensor[item.integer] : Py_None;
  Py_INCREF(value);
  return value;
}

// autograd notices a change of a saved tensor by its version, which no kernel raises; inference tensors have none
bool raise_versions(const Plan& plan, const Call& call) {
  if (plan.written.empty()) return true;
  PyObject* changed = PyList_New(0);
  if (changed == nullptr) return false;
  bool done = true;
  for (size_t i = 0; done && i < plan.written.size(); ++i) {
    PyObject* tensor = call.tensor[plan.written[i]];
    const int inference = truth(PyObject_CallMethodObjArgs(tensor, torch_.is_inference, nullptr));
    done = inference > 0 || (inference == 0 && PyList_Append(changed, tensor) == 0);
  }
  done = done && truth(PyObject_CallFunctionObjArgs(torch_.increment_version, changed, nullptr)) >= 0;
  Py_DECREF(changed);
  return done;
}

// False where the kernel refuses the call: nothing is written then, and the function says why.
bool run(const Plan& plan, const Call& call, AtenTensorHandle* outputs) {
  StableIValue stack[kMostArguments];
  int n = 0;
  for (const Item& item : plan.arguments) stack[n++] = argument_of(item, call);
  PyThreadState* thread = PyEval_SaveThread();
  const AOTITorchError error = torch_call_dispatcher(plan.kernel.c_str(), "", stack, TORCH_ABI_VERSION);
  PyEval_RestoreThread(thread);
  if (error) return false;
  for (int i = 0; i < plan.outputs; ++i) outputs[i] = torch::stable::detail::to<AtenTensorHandle>(stack[i]);
  return true;
}

PyObject* results_of(const Plan& plan, const Call& call, AtenTensorHandle const* outputs) {
  if (!raise_versions(plan, call)) return nullptr;
  if (!plan.tuple) return result_of(plan.results[0], call, outputs);
  PyObject* results = PyTuple_New(static_cast<Py_ssize_t>(plan.results.size()));
  for (size_t i = 0; results != nullptr && i < plan.results.size(); ++i) {
    PyObject* result = result_of(plan.results[i], call, outputs);
    if (result == nullptr) {
      Py_DECREF(results);
      return nullptr;
    }
    PyTuple_SetItem(results, static_cast<Py_ssize_t>(i), result);
  }
  return results;
}

PyObject* recorded(Op& op, const Call& call, PyObject* args, PyObject* kwargs) {
  const long generation = op.generation;
  PyObject* both = PyObject_CallFunctionObjArgs(op.record, args, kwargs == nullptr ? Py_None : kwargs, nullptr);
  if (both == nullptr) return nullptr;
  PyObject *result = nullptr, *made = nullptr;
  if (!PyArg_ParseTuple(both, "OO", &result, &made)) {
    Py_DECREF(both);
    return nullptr;
  }
  Py_INCREF(result);
  std::shared_ptr<const Plan> plan = made == Py_None ? nullptr : plan_of(made);
  Py_DECREF(both);
  long now = 0;
  if (PyErr_Occurred() || !read_number(torch_.backends, torch_.generation, now)) {
    Py_DECREF(result);
    return nullptr;
  }
  // the setting or the entry may have changed meanwhile
  const auto found = op.entries.find(call.hash());
  if (now == generation && op.generation == generation && found != op.entries.end() && found->second.of(call)) {
    op.failures = plan == nullptr ? op.failures + 1 : 0;
    found->second.refused = plan == nullptr;
    found->second.plan = std::move(plan);
  }
  return result;
}

PyObject* called(Op& op, PyObject* args, PyObject* kwargs) {
  Call call;
  const int plain = read_call(op, call, args, kwargs);
  if (plain < 0) return nullptr;
  if (plain == 0) return PyObject_Call(op.function, args, kwargs);
  const uint64_t hash = call.hash();
  const auto found = op.entries.find(hash);
  if (found == op.entries.end()) {
    if (op.entries.size() >= kMostKeys) op.entries.clear();
    op.entries.emplace(hash, Entry{{call.key, call.key + call.words}});
    return PyObject_Call(op.function, args, kwargs);
  }
  const Entry& entry = found->second;
  if (entry.refused || !entry.of(call)) return PyObject_Call(op.function, args, kwargs);
  if (entry.plan == nullptr) return recorded(op, call, args, kwargs);
  // another thread may forget the entry while the kernel runs
  const std::shared_ptr<const Plan> plan = entry.plan;
  AtenTensorHandle outputs[kMostArguments];
  if (!run(*plan, call, outputs)) return PyObject_Call(op.function, args, kwargs);
  ++op.repeated;
  PyObject* results = results_of(*plan, call, outputs);
  for (int i = 0; i < plan->outputs; ++i) aoti_torch_delete_tensor_object(outputs[i]);
  return results;
}

PyObject* replay_call(PyObject* self, PyObject* args, PyObject* kwargs) {
  try {
    return called(op_of(self), args, kwargs);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyObject* replay_new(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject *function = nullptr, *record = nullptr;
  int writes = 0;
  if (!PyArg_ParseTuple(args, "OOp", &function, &record, &writes)) return nullptr;
  Op* op = new (std::nothrow) Op{function, record, writes != 0};
  if (op == nullptr) return PyErr_NoMemory();
  PyObject* self = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc))(type, 0);
  if (self == nullptr) {
    delete op;
    return nullptr;
  }
  Py_INCREF(function);
  Py_INCREF(record);
  reinterpret_cast<Replay*>(self)->op = op;
  return self;
}

void replay_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  Py_DECREF(op_of(self).function);
  Py_DECREF(op_of(self).record);
  delete &op_of(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

PyObject* replay_counts(PyObject* self, PyObject*) {
  const Op& op = op_of(self);
  const auto planned = std::count_if(op.entries.begin(), op.entries.end(),
                                     [](const auto& entry) { return entry.second.plan != nullptr; });
  return Py_BuildValue("nnL", static_cast<Py_ssize_t>(op.entries.size()), static_cast<Py_ssize_t>(planned),
                       op.repeated);
}

bool holds(PyObject* tensor) {
  PyObject* address = PyObject_GetAttrString(tensor, "_cdata");
  if (address == nullptr) return false;
  const void* expected = PyLong_AsVoidPtr(address);
  Py_DECREF(address);
  if (PyErr_Occurred()) return false;
  const void* held = nullptr;
  std::memcpy(&held, handle_of(tensor), sizeof(held));
  if (held != expected) {
    PyErr_SetString(PyExc_ImportError, "this torch keeps tensors in another way than the library was built for");
    return false;
  }
  PyObject* again = wrapped(handle_of(tensor));
  if (again == nullptr) return false;
  const bool same = again == tensor;
  Py_DECREF(again);
  if (!same) PyErr_SetString(PyExc_ImportError, "this torch makes other Python objects of tensors");
  return same;
}

PyObject* setup(PyObject*, PyObject* args) {
  Torch given{};
  PyObject* samples = nullptr;
  if (!PyArg_ParseTuple(args, "OOOOO!OOO!O!O!", &given.tensor, &given.parameter, &given.dtype, &given.requires_gradient,
                        &PyTuple_Type, &given.modes, &given.gradients_enabled, &given.increment_version, &PyDict_Type,
                        &given.forward_ad, &PyDict_Type, &given.backends, &PyTuple_Type, &samples)) {
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < PyTuple_Size(samples); ++i) {
    if (!holds(PyTuple_GetItem(samples, i))) return nullptr;
  }
  for (PyObject* kept : {given.tensor, given.parameter, given.dtype, given.requires_gradient, given.modes,
                         given.gradients_enabled, given.increment_version, given.forward_ad, given.backends}) {
    Py_INCREF(kept);
  }
  given.read = reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(given.requires_gradient), Py_tp_descr_get));
  given.is_inference = PyUnicode_InternFromString("is_inference");
  given.level = PyUnicode_InternFromString("_current_level");
  given.generation = PyUnicode_InternFromString("generation");
  torch_ = given;
  Py_RETURN_NONE;
}

PyMethodDef replay_methods[] = {
    {"counts", replay_counts, METH_NOARGS, "Keys, keys with a plan, calls that were repeated."},
    {nullptr, nullptr, 0, nullptr},
};
PyType_Slot replay_slots[] = {
    {Py_tp_doc, const_cast<char*>("Replay(function, record, writes): repeats the function's calls.")},
    {Py_tp_new, reinterpret_cast<void*>(replay_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(replay_dealloc)},
    {Py_tp_call, reinterpret_cast<void*>(replay_call)},
    {Py_tp_methods, replay_methods},
    {0, nullptr},
};
PyType_Spec replay_spec = {"tilefuse._direct.Replay", sizeof(Replay), 0, Py_TPFLAGS_DEFAULT, replay_slots};
PyMethodDef methods[] = {
    {"setup", setup, METH_VARARGS, "Names what calls ask of torch, and checks what the library assumes of it."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "tilefuse._direct", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

}  // namespace tilefuse

PyMODINIT_FUNC PyInit__direct() {
  PyObject* made = PyModule_Create(&tilefuse::module);
  PyObject* type = made == nullptr ? nullptr : PyType_FromSpec(&tilefuse::replay_spec);
  if (type == nullptr || PyModule_AddObject(made, "Replay", type) < 0) {
    Py_XDECREF(type);
    Py_XDECREF(made);
    return nullptr;
  }
  return made;
}
