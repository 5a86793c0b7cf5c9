"""The command line: exit codes, JSON, usage errors, and that `verify` sees a broken kernel."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import tilefuse
from tilefuse import backends, cli, library
from tilefuse.cli import _console, doctor, verify
from tilefuse.testing import verification
from tilefuse.testing.sample import Sample
from tilefuse.testing.verification import Check

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="what is said on a machine without a GPU")


def run(capsys, *argv):
    code = cli.main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_command_has_help_and_json(capsys):
    assert {"bench", "doctor", "tune", "verify", "warmup"} <= set(cli.commands())
    code, out, _ = run(capsys, "--help")
    assert code == cli.OK
    for name in cli.commands():
        assert name in out
        code, text, _ = run(capsys, name, "--help")
        assert code == cli.OK
        assert "--json" in text


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("frobnicate",),
        ("doctor", "--no-such-option"),
        ("bench", "--suite", "huge"),
        ("bench", "--family", "nonsense"),
        ("bench", "--case", "no case is called this"),
        ("verify", "--family", "nonsense"),
        ("verify", "--op", "nonsense"),
        ("verify", "--record", "--quick"),
        ("tune", "--kernel", "nonsense"),
        ("warmup", "--arch", "sm_1"),
    ],
)
def test_wrong_usage_is_exit_code_2(capsys, argv):
    code, out, err = run(capsys, *argv)
    assert code == cli.USAGE
    assert "usage:" in err
    assert out == ""


@NO_GPU
@pytest.mark.parametrize(
    "argv", [("verify", "--record"), ("verify", "--device", "cuda"), ("bench", "--device", "cuda")]
)
def test_asking_for_a_gpu_that_is_not_there_is_wrong_usage(capsys, argv):
    code, _, err = run(capsys, *argv)
    assert code == cli.USAGE
    assert "GPU" in err


@NO_GPU
@pytest.mark.parametrize("argv", [("tune",), ("warmup",)])
def test_commands_that_need_a_gpu_say_so(capsys, argv):
    code, out, _ = run(capsys, *argv)
    assert code == cli.FAILED
    assert "GPU" in out
    code, out, _ = run(capsys, *argv, "--json")
    assert code == cli.FAILED
    assert "GPU" in json.loads(out)["error"]


def test_doctor_json(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert code == (cli.FAILED if any(f["broken"] for f in found["findings"]) else cli.OK)
    assert found["versions"]["torch"] == torch.__version__
    assert found["ops"] == len(tilefuse.ops())
    assert set(found["native"]) == {"cpu", "cuda", "direct"}
    assert all(f["fix"] for f in found["findings"])


def test_doctor_in_words(capsys):
    _code, out, _ = run(capsys, "doctor")
    # the verdict is the first line, the tables come after it
    assert out.splitlines()[0].startswith(("This machine runs tilefuse on ", "tilefuse works here, on "))
    assert out.index("Details") < out.index("Devices") < out.index("Backends")


def here(**changes):
    """A machine without fault or GPU, changed."""
    everything = dict.fromkeys(doctor.LIBRARIES, "99.0")
    fine = doctor.Machine(
        torch="2.13.0+cpu",
        torch_build="cpu",
        gpus=(),
        hardware=None,
        cpu_missing=None,
        cuda_missing="not built",
        unloadable=frozenset(),
        cuda_archs=(),
        triton_missing=None,
        tools=frozenset({"g++", "ninja"}),
        cxx="g++",
        cxx_runs=True,
        packages=everything,
        verified=frozenset(),
    )
    return replace(fine, **changes)


H100 = {
    "torch": "2.13.0+cu130",
    "torch_build": "cuda",
    "gpus": (("NVIDIA H100, 80 GiB", "sm_90"),),
    "hardware": "NVIDIA",
    "cuda_missing": None,
    "cuda_archs": ("sm_80", "sm_90a"),
    "verified": frozenset({"sm_90"}),
}


def test_doctor_says_full_speed_and_means_it():
    for m, where in ((here(), "the CPU"), (here(**H100), "NVIDIA H100, 80 GiB")):
        found = doctor.findings(m)
        assert all(f.note for f in found), found
        assert doctor.verdict(m, found) == f"This machine runs tilefuse on {where} at full speed."


@pytest.mark.parametrize(
    ("changes", "says", "fix"),
    [
        ({"torch": "2.10.1"}, "torch 2.10.1 is too old", "pip install -U 'torch>=2.11'"),
        ({"hardware": "NVIDIA"}, "build for CPUs only", "pip install --force-reinstall torch"),
        ({"hardware": "AMD"}, "build for CPUs only", "install a ROCm build of torch"),
        ({"hardware": "NVIDIA", "torch_build": "cuda"}, "torch cannot use it", "nvidia-smi"),
        ({"backend": "reference"}, "'reference' is forced", "unset TILEFUSE_BACKEND"),
        ({"cpu_missing": "x"}, "C++ kernels for the CPU were not built", "make native"),
        (
            {"cpu_missing": "x", "tools": frozenset(), "cxx_runs": False},
            "not built",
            "apt-get install g++ && pip install ninja && make",
        ),
        # a compiler of CXX that runs needs no g++; one that does not stops the build whether there is g++ or not
        ({"cpu_missing": "x", "tools": frozenset({"ninja"}), "cxx": "clang++"}, "were not built.", "make native"),
        (
            {"cpu_missing": "x", "cxx": "ccache clang++", "cxx_runs": False},
            "CXX names a compiler that does not run: ccache clang++.",
            "unset CXX && make native",
        ),
        (
            {"cpu_missing": "x", "tools": frozenset({"ninja"}), "cxx": "icpx", "cxx_runs": False},
            "does not run: icpx.",
            "unset CXX && sudo apt-get install g++ && make native",
        ),
        ({"cpu_missing": "x", "in_checkout": False}, "not built", "pip install --no-build-isolation ."),
        ({"cpu_missing": "bad magic", "unloadable": frozenset({"cpu"})}, "do not load: bad magic", "make native"),
        (H100 | {"triton_missing": "Triton 3.5.0 is older than 3.6"}, "3.5.0", "pip install -U 'triton>=3.6'"),
        (H100 | {"interpreting": True}, "interpreter", "unset TRITON_INTERPRET"),
        (H100 | {"cuda_missing": "x"}, "CUDA kernels were not built", "install the CUDA toolkit"),
        (H100 | {"cuda_missing": "x", "tools": frozenset({"nvcc"})}, "not built", "make native"),
        (H100 | {"cuda_archs": ("sm_80",)}, "built for sm_80, this GPU is sm_90", "TORCH_CUDA_ARCH_LIST='9.0'"),
        (
            H100 | {"verified": frozenset()},
            "ever verified on a GPU of this kind (sm_90)",
            "python -m tilefuse verify --record",
        ),
    ],
)
def test_doctor_says_one_thing_in_plain_words(changes, says, fix):
    m = here(**changes)
    (finding,) = [f for f in doctor.findings(m) if not f.note]
    assert says in finding.what
    assert finding.costs
    assert fix in finding.fix
    sentence = doctor.verdict(m, [finding])
    assert "1 thing" in sentence
    assert ("broken" in sentence) == finding.broken


@pytest.mark.parametrize(
    ("value", "command", "version"),
    [
        (None, "g++", None),
        ("", "g++", None),
        ("echo one", "echo one", "one --version"),
        ("no-such-compiler -m64", "no-such-compiler -m64", None),
        ("false", "false", None),
        ("'open quote", "'open quote", None),
    ],
)
def test_doctor_asks_the_compiler_that_a_build_would_use(monkeypatch, tmp_path, capsys, value, command, version):
    if value:
        monkeypatch.setenv("CXX", value)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
    assert doctor.compiler() == (command, version)
    _code, out, _ = run(capsys, "doctor")
    assert f"a build uses {command}" in " ".join(out.split())


def test_doctor_counts():
    m = here(hardware="NVIDIA", cpu_missing="x")
    assert "2 things keep it from full speed" in doctor.verdict(m, doctor.findings(m))
    m = here(torch="2.9", cpu_missing="x", backend="cpu")
    assert doctor.verdict(m, doctor.findings(m)) == (
        "1 thing is broken on this machine, and 2 more keep it from full speed:"
    )


def test_doctor_notes_cost_no_speed():
    m = here(packages=dict.fromkeys(doctor.LIBRARIES), triton_missing="no Triton")
    found = doctor.findings(m)
    assert all(f.note for f in found)
    text = " ".join(f.what for f in found)
    for name in ("There is no GPU", "transformers is not installed", "matplotlib", "rich", "no Triton"):
        assert name in text
    assert any("older than 5.23" in f.what for f in doctor.findings(here(packages={"transformers": "5.2"})))


@pytest.mark.parametrize(
    ("gpu", "built", "runs"),
    [
        ("sm_90", ("sm_90a",), True),
        ("sm_89", ("sm_80", "sm_90a"), True),
        ("sm_80", ("sm_89",), False),
        ("sm_103", ("sm_100a",), False),
        ("sm_120", ("sm_80", "sm_90a", "sm_100a"), False),
        ("sm_90", (), False),
    ],
)
def test_which_gpus_a_build_runs_on(gpu, built, runs):
    assert doctor.built_for(gpu, built) is runs


def test_doctor_fails_on_a_library_that_cannot_be_loaded(capsys, monkeypatch, tmp_path):
    path = tmp_path / "_cpu.abi3.so"
    path.write_bytes(b"not a library")
    broken = SimpleNamespace(name="cpu", path=path, missing="_cpu.abi3.so cannot be loaded: bad magic", info={})
    real = doctor.native.load
    monkeypatch.setattr(doctor.native, "load", lambda name: broken if name == "cpu" else real(name))
    code, out, _ = run(capsys, "doctor")
    assert code == cli.FAILED
    assert "bad magic" in out


def test_as_a_process():
    done = subprocess.run(
        [sys.executable, "-m", "tilefuse", "doctor", "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == cli.OK, done.stderr
    assert json.loads(done.stdout)["versions"]["tilefuse"] == tilefuse.__version__
    done = subprocess.run([sys.executable, "-m", "tilefuse", "nothing"], capture_output=True, text=True, timeout=120)
    assert done.returncode == cli.USAGE


def test_plain_text_without_rich(capsys, monkeypatch):
    monkeypatch.setattr(_console, "rich", None)
    _code, out, _ = run(capsys, "doctor")
    assert "Versions" in out and "┃" not in out
    console = _console.Console(False)
    with console.progress(2, "work") as progress:
        progress.start("first")
        progress.done()
    assert "[1/2]" in capsys.readouterr().out


def test_json_keeps_stdout_clean(capsys):
    code, out, err = run(capsys, "verify", "--quick", "--op", "rope", "--json")
    found = json.loads(out)
    assert code == cli.OK, err
    assert found["failed"] == 0
    assert {c["op"] for c in found["checks"]} == {"rope"}
    assert all(c["samples"] > 0 and c["gradients"] > 0 for c in found["checks"])


def test_failed_check_is_exit_code_1(capsys, monkeypatch):
    def check_op(name, device, backend, **options):
        return Check(name, "rope", backend, str(device), "failed", 1, 0, 9.0, (), "output 0: off")

    monkeypatch.setattr(verification, "check_op", check_op)
    code, out, _ = run(capsys, "verify", "--quick", "--op", "rope")
    assert code == cli.FAILED
    assert "off" in out


def broken_kernel(monkeypatch, name, spoil, forward=None):
    """The reference kernel, spoiled, as every other backend of a kernel; ``forward`` stays right."""

    def replace(kernel, change):
        real = kernel.implementation

        def implementation(backend):
            if backend == "reference":
                return real(backend)
            return (lambda *args: change(real("reference")[0](*args))), None

        monkeypatch.setattr(kernel, "implementation", implementation)

    replace(library.kernels()[name], spoil)
    if forward:
        replace(library.kernels()[forward], lambda out: out)
    # kernels cache their choice until the setting changes
    backends.forget()


def one_row_off(out):
    out = out.clone()
    if out.numel():
        out[0] *= 1.05
    return out


@pytest.mark.parametrize(
    "spoil", [lambda out: out * 1.02, one_row_off, torch.empty_like, lambda out: out + torch.rand(()) * 1e-2]
)
def test_verify_sees_a_broken_kernel(monkeypatch, spoil):
    good = verification.check_op("rope", "cpu", "reference", limit=4)
    assert good.status == "ok", good.reason
    assert good.samples == 4 and good.gradients > 0
    broken_kernel(monkeypatch, "rope_fwd", spoil)
    assert verification.check_op("rope", "cpu", "cpu", limit=4).status == "failed"


@pytest.mark.parametrize("spoil", [lambda out: out * 1.02, one_row_off])
def test_verify_sees_a_broken_backward(monkeypatch, spoil):
    assert verification.check_op("merge_attention", "cpu", "reference", limit=3).gradients == 3
    broken_kernel(
        monkeypatch, "merge_attention_bwd", lambda out: (spoil(out[0]), *out[1:]), forward="merge_attention_fwd"
    )
    check = verification.check_op("merge_attention", "cpu", "triton", limit=3)
    assert check.status == "failed"
    assert "gradient 0" in check.reason


def test_naive_is_rounded_after_each_step():
    x, y = torch.randn(8, 64), torch.randn(64, 8)
    with verification.StepByStep(torch.bfloat16):
        got = (x @ y).exp().sum(0)
    exponential = (x @ y).bfloat16().exp()
    assert torch.equal(got, exponential.float().sum(0).bfloat16().float())
    tables = torch.rand(8, 32), torch.rand(8, 32)
    z = torch.randn(5, 2, 64, dtype=torch.bfloat16)
    with tilefuse.backend("reference"):
        exact = tilefuse.rope(z.double(), *tables)
        once = tilefuse.rope(z, *tables)
        with verification.StepByStep(torch.bfloat16):
            steps = tilefuse.rope(z, *tables)
    assert (steps - exact).abs().mean() > 1.2 * (once - exact).abs().mean()


def test_verify_accepts_the_reference_under_another_name(monkeypatch):
    broken_kernel(monkeypatch, "rope_fwd", lambda out: out)
    check = verification.check_op("rope", "cpu", "cpu", limit=4, all_dtypes=True)
    assert check.status == "ok", check.reason
    assert check.samples > 4
    assert "rope_fwd" in check.kernels


def test_backend_that_refuses_every_sample_is_unavailable():
    check = verification.check_op("rope", "cpu", "cuda", limit=2)
    assert check.status == "unavailable"
    assert "rope" in check.reason


def test_recast_leaves_operands_that_must_be_float32():
    x, table = torch.randn(5, 2, 64), torch.rand(8, 32)
    sample = Sample((x, table, table), {})
    wide = verification.recast(tilefuse.rope, sample, torch.float64)
    assert [a.dtype for a in wide.args] == [torch.float64, torch.float32, torch.float32]
    narrow = verification.recast(tilefuse.rope, sample, torch.bfloat16)
    assert [a.dtype for a in narrow.args] == [torch.bfloat16, torch.float32, torch.float32]
    assert verification.recast(tilefuse.rope, sample, torch.int32) is None


def test_record_writes_what_passed_and_nothing_else(monkeypatch, tmp_path):
    path = tmp_path / "verified.json"
    path.write_text(json.dumps({"sm_80": {"kernels": {"other": ["cuda"]}}}))
    monkeypatch.setattr(backends, "VERIFIED_PATH", path)
    monkeypatch.setattr(verify.arch, "of", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")

    def check(backend, status, kernels=("rope_fwd",)):
        return Check("rope", "rope", backend, "cuda", status, 3, 1, 0.5, kernels)

    device = torch.device("cuda")
    verify._record([check("cuda", "ok"), check("triton", "failed"), check("reference", "ok")], device)
    found = json.loads(path.read_text())
    assert found["sm_80"]["kernels"] == {"other": ["cuda"]}
    assert found["sm_90"]["kernels"] == {"rope_fwd": ["cuda"]}
    assert found["sm_90"]["device"] == "NVIDIA H100"
    # a later failure takes the record back
    verify._record([check("cuda", "failed"), check("triton", "ok")], device)
    assert json.loads(path.read_text())["sm_90"]["kernels"] == {"rope_fwd": ["triton"]}
    backends.verified.cache_clear()


def test_bench_writes_lines_table_and_plots(capsys, monkeypatch, tmp_path):
    from tilefuse.benchmarks import harness, records, runner

    def inputs(device, generator):
        return (harness.normal((4, 64), torch.float32, device, generator),)

    case = harness.Case(
        op="toy",
        name="4 x 64",
        dtype="float32",
        inputs=inputs,
        run=torch.exp,
        oracle=torch.exp,
        peers={"eager": torch.exp},
        bytes=2048,
        family="rope",
    )
    monkeypatch.setattr(harness, "discover", lambda *args, **options: [case])
    monkeypatch.setattr(runner, "MAX_SETS", 2)
    code, out, err = run(capsys, "bench", "--device", "cpu", "--out", str(tmp_path), "--seconds", "0.01", "--json")
    found = json.loads(out)
    assert code == cli.OK, err
    assert [line["status"] for line in found["lines"]] == ["ok"]
    assert len(records.read_lines(tmp_path / f"{records.device_key(torch.device('cpu'))}.jsonl")) == 1
    assert all((tmp_path / p).exists() for p in found["plots"])
    code, out, _ = run(capsys, "bench", "--device", "cpu", "--out", str(tmp_path), "--report")
    assert code == cli.OK
    assert "4 x 64" in out and "toy" in out
    code, out, _ = run(capsys, "bench", "--list", "--json")
    assert json.loads(out) == [case.id]


@pytest.mark.parametrize(
    ("load", "status", "code"), [(None, "failed", cli.FAILED), ("median spread 40%", "unjudged", cli.OK)]
)
def test_bench_judges_at_its_end_and_says_that_it_ran_under_load(capsys, monkeypatch, tmp_path, load, status, code):
    from tilefuse.benchmarks import harness, records, roofline, runner

    def inputs(device, generator):
        return (harness.normal((4, 64), torch.float32, device, generator),)

    options = {"op": "toy", "dtype": "float32", "inputs": inputs, "run": torch.exp, "family": "rope"}
    options |= {"oracle": torch.exp, "peers": {"eager": torch.exp}}
    # the first is faster than any roof, the second than the first roof only
    cases = [harness.Case(name="too fast", bytes=10**15, **options), harness.Case(name="b", bytes=2048, **options)]
    roofs = iter([1e-6, 1e-6])
    monkeypatch.setattr(
        roofline, "measure", lambda device: roofline.Roof(*[next(roofs, 1e4)] * 4, {"float32": 1e3, "bfloat16": 1e3})
    )
    monkeypatch.setattr(harness, "discover", lambda *args, **options: cases)
    monkeypatch.setattr(runner, "MAX_SETS", 2)
    monkeypatch.setattr(records, "under_load", lambda lines: load)
    arguments = ("bench", "--device", "cpu", "--out", str(tmp_path), "--seconds", "0.01", "--json")
    returned, out, words = run(capsys, *arguments)
    assert returned == code, words
    found = json.loads(out)
    stored = records.read_lines(tmp_path / f"{records.device_key(torch.device('cpu'))}.jsonl")
    for lines in (found["lines"], stored):
        assert {line["name"]: line["status"] for line in lines} == {"too fast": status, "b": "ok"}
        assert {line["roof"]["copy_gbps"] for line in lines} == {1e4}
    said = "under load (median spread 40%): times are too long, 1 of 2 cases beat the roof and are not judged"
    assert words.count(said) == (1 if load else 0) and found["load"] == load


def test_check_that_runs_out_of_time_is_incomplete_and_not_recorded(monkeypatch, tmp_path):
    check = verification.check_op("rope", "cpu", "reference", limit=4, seconds=0)
    assert not check.complete
    assert "left out" in check.reason
    path = tmp_path / "verified.json"
    path.write_text("{}")
    monkeypatch.setattr(backends, "VERIFIED_PATH", path)
    monkeypatch.setattr(verify.arch, "of", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    checks = [Check("rope", "rope", "cuda", "cuda", "ok", 3, 1, 0.5, ("rope_fwd",), complete=False)]
    assert verify._record(checks, torch.device("cuda"))["kernels"] == {}
    backends.verified.cache_clear()


def test_verify_in_processes_of_their_own(capsys):
    code, out, err = run(capsys, "verify", "--quick", "--op", "rope", "--jobs", "1", "--json")
    assert code == cli.OK, err
    assert {c["status"] for c in json.loads(out)["checks"]} == {"ok"}
    code, out, _ = run(capsys, "verify", "--quick", "--op", "rope", "--jobs", "1", "--timeout", "0.1", "--json")
    assert code == cli.FAILED
    assert "took more than" in json.loads(out)["checks"][0]["reason"]
