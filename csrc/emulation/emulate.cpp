// The scheduler behind cuda_emulation.h: fibres, barriers, warp operations, shared memory, and the handlers that turn a
// sanitizer's finding inside a kernel into an error.
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation/cuda_emulation.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace tilefuse::emulation {
namespace {

#if defined(__x86_64__)
// saves the callee-saved registers and the rounding modes on the old stack and continues on the new one; ucontext would
// make two system calls for each switch
extern "C" void tilefuse_emulation_switch(void** save, void* load);
asm(R"(
.text
.align 16
.hidden tilefuse_emulation_switch
.globl tilefuse_emulation_switch
.type tilefuse_emulation_switch, @function
tilefuse_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tilefuse_emulation_switch, .-tilefuse_emulation_switch
)");

struct Context {
  void* stack_pointer = nullptr;

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<uint64_t*>(stack + bytes);
    *--top = 0;
    // `ret` leaves the stack pointer where a call instruction would have left it
    *--top = reinterpret_cast<uint64_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    uint32_t modes[2] = {0, 0};
    asm volatile("stmxcsr %0\n\tfnstcw %1" : "=m"(modes[0]), "=m"(modes[1]));
    std::memcpy(--top, modes, 8);
    stack_pointer = top;
  }
  static void swap(Context& from, Context& to) { tilefuse_emulation_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;

  void prepare(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

enum class State : uint8_t { ready, at_barrier, in_warp, done };

struct Copy {
  void* to;
  const void* from;
  int bytes;
  int valid;
};

struct Fibre {
  Context context;
  State state;
  uint3 index;
  Site site;
  // barrier
  int vote;
  // warp operation
  Warp operation;
  uint32_t mask;
  uint64_t value;
  int argument;
  int width;
  // what the fibre is resumed with
  uint64_t result;
  std::vector<std::vector<Copy>> copies;
};

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kGuardBytes = 4096;
constexpr size_t kCanaryBytes = 256;
constexpr unsigned char kPoison = 0xff;
constexpr unsigned char kCanary = 0xa7;
// a fibre that spins on atomics this long without anybody getting further is taken for a hang
constexpr uint64_t kSpinLimit = uint64_t{1} << 22;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxDynamicShared = 227 * 1024;

enum class Order { forward, reverse, random };
Order order = Order::forward;
std::mt19937_64 generator;

std::vector<Fibre> fibres;
char* stacks = nullptr;
Context scheduler;
Fibre* current = nullptr;
bool inside = false;
const std::function<void()>* body = nullptr;
std::vector<unsigned char> dynamic_memory;
size_t dynamic_bytes = 0;
std::string failure;
uint64_t spins = 0;
uint64_t atomics = 0;
bool yielded = false;
unsigned long long clock_ticks = 0;
int at_barrier = 0;
int finished = 0;

const char* name_of(Warp operation) {
  switch (operation) {
    case Warp::sync:
      return "__syncwarp";
    case Warp::index:
      return "__shfl_sync";
    case Warp::up:
      return "__shfl_up_sync";
    case Warp::down:
      return "__shfl_down_sync";
    case Warp::butterfly:
      return "__shfl_xor_sync";
    case Warp::ballot:
      return "a vote";
    case Warp::match:
      return "__match_any_sync";
  }
  return "";
}

std::string at(Site site) {
  const std::string path = site.file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line);
}

std::string hex(uint32_t mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

std::string coordinates(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string describe(const Fibre& fibre) {
  const std::string who = "thread " + coordinates(fibre.index);
  switch (fibre.state) {
    case State::done:
      return who + " has exited";
    case State::at_barrier:
      return who + " waits at the barrier of " + at(fibre.site);
    case State::in_warp:
      return who + " waits in " + name_of(fibre.operation) + " of " + at(fibre.site) + " with mask " + hex(fibre.mask);
    case State::ready:
      break;
  }
  return who + " runs";
}

int index_of(const Fibre& fibre) { return static_cast<int>(&fibre - fibres.data()); }

// ends the kernel: control never returns to this fibre
[[noreturn]] void abandon(const std::string& message) {
  if (!inside) {
    std::fprintf(stderr, "tilefuse emulation: outside a kernel: %s\n", message.c_str());
    std::abort();
  }
  failure = message;
  current->state = State::done;
  Context::swap(current->context, scheduler);
  std::abort();
}

void wait() { Context::swap(current->context, scheduler); }

// the thread-local variables of this library apart from pybind11's: kernels' static __shared__ arrays
struct SharedVariable {
  size_t offset;
  size_t bytes;
};

int find_module(dl_phdr_info* info, size_t, void* data) {
  const auto address = reinterpret_cast<uintptr_t>(&find_module);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    if (header.p_type == PT_LOAD && begin <= address && address < begin + header.p_memsz) {
      *static_cast<std::pair<std::string, size_t>*>(data) = {info->dlpi_name, info->dlpi_tls_modid};
      return 1;
    }
  }
  return 0;
}

extern "C" void* __tls_get_addr(void*);

struct SharedMemory {
  std::vector<SharedVariable> variables;
  size_t module = 0;

  SharedMemory() {
    std::pair<std::string, size_t> found;
    dl_iterate_phdr(find_module, &found);
    module = found.second;
    std::ifstream file(found.first, std::ios::binary);
    const std::string image((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    if (module == 0 || image.size() < sizeof(Elf64_Ehdr)) return;
    const auto* elf = reinterpret_cast<const Elf64_Ehdr*>(image.data());
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(image.data() + elf->e_shoff);
    for (int i = 0; i < elf->e_shnum; ++i) {
      if (sections[i].sh_type != SHT_SYMTAB) continue;
      const auto* symbols = reinterpret_cast<const Elf64_Sym*>(image.data() + sections[i].sh_offset);
      const char* names = image.data() + sections[sections[i].sh_link].sh_offset;
      for (size_t s = 0; s < sections[i].sh_size / sizeof(Elf64_Sym); ++s) {
        const bool shared = ELF64_ST_TYPE(symbols[s].st_info) == STT_TLS && symbols[s].st_shndx != SHN_UNDEF &&
                            std::strstr(names + symbols[s].st_name, "pybind11") == nullptr;
        if (shared) variables.push_back({symbols[s].st_value, symbols[s].st_size});
      }
    }
  }

  void poison() const {
    for (const auto& variable : variables) {
      size_t index[2] = {module, variable.offset};
      std::memset(__tls_get_addr(index), kPoison, variable.bytes);
    }
    std::memset(dynamic_memory.data(), kCanary, dynamic_memory.size());
    std::memset(dynamic_shared(), kPoison, dynamic_bytes);
  }

  void check() const {
    const auto* begin = static_cast<const unsigned char*>(dynamic_shared());
    for (size_t i = 0; i < kCanaryBytes; ++i) {
      if (begin[dynamic_bytes + i] != kCanary || begin[-1 - static_cast<ptrdiff_t>(i)] != kCanary) {
        throw std::runtime_error("tilefuse emulation: block " + coordinates(blockIdx) + " wrote outside the " +
                                 std::to_string(dynamic_bytes) +
                                 " bytes of dynamic shared memory it was launched with");
      }
    }
  }
};

void fibre_main() {
  try {
    (*body)();
  } catch (const std::exception& error) {
    failure = error.what();
  }
  current->state = State::done;
  wait();
}

// completes the operation that `fibre` waits in if every lane of its mask that still runs has arrived
void complete_warp(const Fibre& fibre) {
  const int first = index_of(fibre) / 32 * 32;
  const int lanes = std::min<int>(32, static_cast<int>(fibres.size()) - first);
  uint32_t members = 0;
  bool complete = true;
  for (int lane = 0; lane < lanes; ++lane) {
    const Fibre& other = fibres[first + lane];
    if ((fibre.mask >> lane & 1u) == 0 || other.state == State::done) continue;
    members |= 1u << lane;
    if (other.state == State::in_warp && other.mask == fibre.mask && other.operation == fibre.operation) continue;
    complete = false;
    // two lanes that name each other but do different things can never meet
    if (other.state == State::in_warp && (other.mask >> (index_of(fibre) - first) & 1u)) {
      failure = describe(fibre) + ", but " + describe(other) +
                ": the lanes of a mask must execute the same operation with the same mask";
    }
  }
  if (!complete) return;
  uint32_t ballot = 0;
  for (int lane = 0; lane < lanes; ++lane) {
    if (members >> lane & 1u && fibres[first + lane].value != 0) ballot |= 1u << lane;
  }
  for (int lane = 0; lane < lanes; ++lane) {
    if ((members >> lane & 1u) == 0) continue;
    Fibre& member = fibres[first + lane];
    const int width = member.width;
    const int base = lane / width * width;
    int source = lane;
    switch (member.operation) {
      case Warp::index:
        source = base + (member.argument & (width - 1));
        break;
      case Warp::up:
        source = lane - member.argument < base ? lane : lane - member.argument;
        break;
      case Warp::down:
        source = lane + member.argument >= base + width ? lane : lane + member.argument;
        break;
      case Warp::butterfly:
        source = (lane ^ member.argument) >= base + width ? lane : lane ^ member.argument;
        break;
      default:
        break;
    }
    if (member.operation == Warp::ballot) {
      member.result = ballot;
    } else if (member.operation == Warp::match) {
      member.result = 0;
      for (int other = 0; other < lanes; ++other) {
        if (members >> other & 1u && fibres[first + other].value == member.value) member.result |= uint64_t{1} << other;
      }
    } else {
      // the value read from a lane that does not take part is undefined: NaN bits
      member.result =
          source >= 0 && source < 32 && members >> source & 1u ? fibres[first + source].value : ~uint64_t{0};
    }
  }
  for (int lane = 0; lane < lanes; ++lane) {
    if (members >> lane & 1u) fibres[first + lane].state = State::ready;
  }
  spins = 0;
}

void release_barrier() {
  int sum = 0;
  for (const auto& fibre : fibres) sum += fibre.vote;
  const int total = static_cast<int>(fibres.size());
  for (auto& fibre : fibres) {
    // the vote's kind is in `argument`
    const auto vote = static_cast<Vote>(fibre.argument);
    fibre.result = vote == Vote::sum ? sum : vote == Vote::conjunction ? sum == total : sum > 0;
    fibre.state = State::ready;
  }
  at_barrier = 0;
  spins = 0;
}

Fibre* next_ready() {
  const int count = static_cast<int>(fibres.size());
  const int step = order == Order::reverse ? count - 1 : 1;
  int start = order == Order::reverse ? count - 1 : 0;
  if (order == Order::random) start = static_cast<int>(generator() % count);
  // the others get their turn when a fibre gave way without waiting for anything
  if (yielded && order != Order::random) start = (index_of(*current) + step) % count;
  yielded = false;
  for (int i = 0; i < count; ++i) {
    Fibre& fibre = fibres[(start + i * step) % count];
    if (fibre.state == State::ready) return &fibre;
  }
  return nullptr;
}

std::string explain_stall() {
  const Fibre* waiting = nullptr;
  for (const auto& fibre : fibres) {
    if (fibre.state == State::at_barrier || (fibre.state == State::in_warp && waiting == nullptr)) {
      waiting = &fibre;
      if (fibre.state == State::at_barrier) break;
    }
  }
  for (const auto& fibre : fibres) {
    if (fibre.state == State::in_warp && waiting->state == State::at_barrier) {
      return describe(*waiting) + ", but " + describe(fibre) + " for lanes that never come";
    }
  }
  if (waiting->state == State::in_warp) {
    const int first = index_of(*waiting) / 32 * 32;
    for (int lane = 0; lane < 32 && first + lane < static_cast<int>(fibres.size()); ++lane) {
      const Fibre& other = fibres[first + lane];
      if ((waiting->mask >> lane & 1u) && other.state != State::done &&
          (other.mask != waiting->mask || other.operation != waiting->operation)) {
        return describe(*waiting) + ", but " + describe(other);
      }
    }
    return describe(*waiting) + " for lanes that never come";
  }
  for (const auto& fibre : fibres) {
    if (fibre.state == State::done) {
      return "only " + std::to_string(at_barrier) + " of " + std::to_string(fibres.size()) +
             " threads reach a barrier: " + describe(*waiting) + ", but " + describe(fibre);
    }
  }
  return describe(*waiting) + " forever";
}

void run_block(const SharedMemory& shared) {
  shared.poison();
  at_barrier = 0;
  finished = 0;
  spins = 0;
  for (size_t i = 0; i < fibres.size(); ++i) {
    Fibre& fibre = fibres[i];
    fibre.state = State::ready;
    const unsigned flat = static_cast<unsigned>(i);
    fibre.index = {flat % blockDim.x, flat / blockDim.x % blockDim.y, flat / blockDim.x / blockDim.y};
    fibre.copies.assign(1, {});
    fibre.context.prepare(stacks + i * (kStackBytes + kGuardBytes) + kGuardBytes, kStackBytes, fibre_main);
  }
  while (finished < static_cast<int>(fibres.size())) {
    Fibre* next = next_ready();
    if (next == nullptr) {
      failure = explain_stall();
    } else {
      current = next;
      threadIdx = next->index;
      inside = true;
      Context::swap(scheduler, next->context);
      if (failure.empty() && next->state == State::done) {
        ++finished;
        spins = 0;
        // its warp may have waited for nobody else
        const int first = index_of(*next) / 32 * 32;
        for (int lane = first; lane < std::min<int>(first + 32, static_cast<int>(fibres.size())); ++lane) {
          if (fibres[lane].state == State::in_warp) complete_warp(fibres[lane]);
        }
      }
      inside = false;
    }
    if (!failure.empty()) {
      const std::string message = "tilefuse emulation: block " + coordinates(blockIdx) + ": " + failure;
      failure.clear();
      throw std::runtime_error(message);
    }
  }
  shared.check();
}

}  // namespace

void set_schedule(const char* name, uint64_t seed) {
  const std::string wanted = name;
  if (wanted != "forward" && wanted != "reverse" && wanted != "random") {
    throw std::invalid_argument("order must be forward, reverse or random, got " + wanted);
  }
  order = wanted == "forward" ? Order::forward : wanted == "reverse" ? Order::reverse : Order::random;
  generator.seed(seed);
}

void launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& thread) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535u ||
      grid.z > 65535u || dynamic_shared_bytes > kMaxDynamicShared) {
    throw std::runtime_error("tilefuse emulation: no GPU accepts this launch: grid " +
                             coordinates({grid.x, grid.y, grid.z}) + ", block " +
                             coordinates({block.x, block.y, block.z}) + ", " + std::to_string(dynamic_shared_bytes) +
                             " bytes of dynamic shared memory");
  }
  static const SharedMemory shared;
  if (stacks == nullptr) {
    const size_t bytes = kMaxThreads * (kStackBytes + kGuardBytes);
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("tilefuse emulation: no memory for the fibres' stacks");
    stacks = static_cast<char*>(memory);
    for (int i = 0; i < kMaxThreads; ++i) mprotect(stacks + i * (kStackBytes + kGuardBytes), kGuardBytes, PROT_NONE);
  }
  fibres.resize(threads);
  dynamic_bytes = dynamic_shared_bytes;
  dynamic_memory.resize(dynamic_bytes + 2 * kCanaryBytes + 128);
  blockDim = block;
  gridDim = grid;
  body = &thread;
  std::vector<uint64_t> sequence(blocks);
  for (uint64_t i = 0; i < blocks; ++i) sequence[i] = order == Order::reverse ? blocks - 1 - i : i;
  if (order == Order::random) std::shuffle(sequence.begin(), sequence.end(), generator);
  for (const uint64_t i : sequence) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    run_block(shared);
  }
}

void* dynamic_shared() {
  // 128-byte aligned, as TMA and 16-byte vectors want it
  const auto base = reinterpret_cast<uintptr_t>(dynamic_memory.data()) + kCanaryBytes;
  return reinterpret_cast<void*>((base + 127) / 128 * 128);
}

int barrier(Vote vote, int value, Site site) {
  Fibre& self = *current;
  self.site = site;
  self.vote = value;
  self.argument = static_cast<int>(vote);
  for (const auto& other : fibres) {
    if (other.state == State::at_barrier && other.site.line != site.line) {
      self.state = State::at_barrier;
      abandon(describe(other) + ", but " + describe(self) + ": every thread must reach the same one");
    }
  }
  self.state = State::at_barrier;
  ++at_barrier;
  if (at_barrier == static_cast<int>(fibres.size())) release_barrier();
  wait();
  return static_cast<int>(self.result);
}

uint64_t warp(Warp operation, uint32_t mask, uint64_t value, int argument, int width, Site site) {
  Fibre& self = *current;
  const int lane = index_of(self) % 32;
  if ((mask >> lane & 1u) == 0) {
    abandon("thread " + coordinates(self.index) + " (lane " + std::to_string(lane) + ") calls " + name_of(operation) +
            " at " + at(site) + " with mask " + hex(mask) + ", which does not name it");
  }
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    abandon(std::string(name_of(operation)) + " at " + at(site) + " has width " + std::to_string(width) +
            ", not a power of two up to 32");
  }
  self.operation = operation;
  self.mask = mask;
  self.value = value;
  self.argument = argument;
  self.width = width;
  self.site = site;
  self.state = State::in_warp;
  complete_warp(self);
  wait();
  return self.result;
}

void yield() {
  if (++spins > kSpinLimit) abandon("thread " + coordinates(current->index) + " spins forever");
  yielded = true;
  wait();
}

void atomic_step() {
  // the other orders switch now and then, so that a thread which spins on a lock lets its owner run
  if (order == Order::random || ++atomics % 64 == 0) yield();
}

unsigned long long ticks() { return ++clock_ticks; }

void fail(const char* what, Site site) {
  abandon("thread " + coordinates(current->index) + ": " + what + " at " + at(site));
}

void async_copy(void* to, const void* from, int bytes, int valid_bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    abandon("thread " + coordinates(current->index) + ": cp.async of " + std::to_string(bytes) +
            " bytes is misaligned");
  }
  current->copies.back().push_back({to, from, bytes, valid_bytes});
}

void async_commit() { current->copies.emplace_back(); }

void async_wait(int pending) {
  auto& groups = current->copies;
  // the last entry is the group that is not committed yet
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const auto& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.valid);
      std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace tilefuse::emulation

// the sanitizer's handlers: code that -fsanitize=... compiled calls them in place of the sanitizer's own library

namespace {
struct Location {
  const char* file;
  uint32_t line;
  uint32_t column;
};
[[noreturn]] void report(const Location* location, const char* what) {
  tilefuse::emulation::fail(what, {location->file != nullptr ? location->file : "?", static_cast<int>(location->line)});
}
}  // namespace

#define TILEFUSE_HANDLER(name, what) \
  extern "C" void __ubsan_handle_##name##_abort(Location* location, void*, void*) { report(location, what); }
TILEFUSE_HANDLER(out_of_bounds, "index out of the array's bounds")
TILEFUSE_HANDLER(add_overflow, "signed integer overflow in +")
TILEFUSE_HANDLER(sub_overflow, "signed integer overflow in -")
TILEFUSE_HANDLER(mul_overflow, "signed integer overflow in *")
TILEFUSE_HANDLER(negate_overflow, "signed integer overflow in negation")
TILEFUSE_HANDLER(divrem_overflow, "division by zero or overflow in division")
// null, misaligned or too small an object
TILEFUSE_HANDLER(type_mismatch_v1, "access through a null or misaligned pointer")
