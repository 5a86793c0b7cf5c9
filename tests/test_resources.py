"""The resource gate: kernels compiled for every architecture, no spill in a loop, no regression; its own tests.

``make test`` compiles the first configuration of each kernel for one architecture, and of one module's kernels for two
others; ``make test-full`` compiles every configuration for all.
"""

import json
import os
import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

import tilefuse
from tilefuse.backends import triton_missing
from tilefuse.cli import main
from tilefuse.testing import aot, emulation
from tilefuse.testing.aot import binaries
from tilefuse.testing.aot.cases import from_file

pytestmark = pytest.mark.xdist_group("resources")

# products in float and FP8, of which each architecture has instructions of its own
REPRESENTATIVE = "grouped_matmul"
EXAMPLES = Path(__file__).with_name("aot_examples.py")
FAMILIES = sorted({op.family for op in tilefuse.ops().values()})

needs_triton = pytest.mark.skipif(
    triton_missing() is not None, reason="nothing to compile with: Triton is not installed"
)


@pytest.fixture(scope="module")
def problems_found():
    """The gate's problems for the first configuration of each kernel."""
    others = aot.records(op=REPRESENTATIVE, targets=("sm_80", "sm_100"), quick=True)
    return [*aot.problems(aot.records(targets=("sm_90",), quick=True)), *aot.problems(others)]


@needs_triton
@pytest.mark.parametrize("family", FAMILIES)
def test_first_configurations(problems_found, family):
    assert [p for p in problems_found if p.startswith(f"{family}/")] == []


@needs_triton
def test_no_problem_outside_the_families(problems_found):
    assert [p for p in problems_found if p.split("/")[0] not in FAMILIES] == []


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_configuration_on_every_architecture(family):
    assert aot.problems(aot.records(family=family)) == []


@pytest.fixture(scope="module")
def examples():
    if triton_missing():
        pytest.skip(triton_missing())
    return aot.records(file=EXAMPLES, targets=("sm_80", "sm_90", "sm_100", "gfx942"))


@needs_triton
def test_quick_takes_the_first_case_of_each_kernel():
    quick = aot.records(file=EXAMPLES, targets=("sm_80",), quick=True)
    assert [(r["case"], r["kernel"]) for r in quick["records"]] == [("wide", "scale"), ("tile", "matmul")]


def test_progress_is_reported(examples):
    seen = []
    aot.records(file=EXAMPLES, targets=("sm_90",), progress=lambda *step: seen.append(step))
    assert seen == [
        (i + 1, 3, f"file/aot_examples/{c} on sm_90")
        for i, c in enumerate(("wide/scale", "narrow/scale", "tile/matmul"))
    ]


def find(result, case, target):
    (record,) = [r for r in result["records"] if (r["case"], r["target"]) == (case, target)]
    return record


def test_figures_of_known_kernels(examples):
    for target in ("sm_80", "sm_90", "sm_100"):
        wide, narrow = find(examples, "wide", target), find(examples, "narrow", target)
        assert (wide["loads_128"], wide["stores_128"], wide["loads_16"]) == (1, 1, 0)
        assert (narrow["loads_128"], narrow["stores_128"], narrow["loads_16"]) == (0, 0, 8)
        assert 0 < wide["registers"] < 64 and wide["stack"] == wide["spills"] == wide["shared"] == 0
    assert set(find(examples, "tile", "sm_80")["matrix"]) == {"HMMA"}
    assert set(find(examples, "tile", "sm_90")["matrix"]) == {"HGMMA"}
    assert set(find(examples, "tile", "sm_100")["matrix"]) == {"UTCHMMA"}
    assert set(find(examples, "tile", "gfx942")["matrix"]) == {"MFMA"}
    assert find(examples, "tile", "sm_90")["shared"] == 2 * 2 * 64 * 64 * 2
    spilling = find(examples, "spilling", "sm_80")
    assert spilling["stack"] > 1000 and spilling["spills"] > 1000


def test_each_kind_of_problem_is_reported(examples):
    found = aot.problems(examples, folder=Path("/nonexistent"))
    expected = [
        "file/aot_examples: forgotten is launched but compiled by no aot case",
        "file/aot_examples/narrow/scale on sm_80: no LDG.128",
        "file/aot_examples/narrow/scale on sm_90: no LDG.128",
        "file/aot_examples/narrow/scale on sm_100: no LDG.128",
    ]
    assert [p for p in found if "spilling" not in p and "unsupported" not in p] == expected
    (spill,) = [p for p in found if "spilling" in p]
    assert spill.startswith("file/aot_examples/spilling/matmul on sm_80: ") and "spill instructions" in spill
    (error,) = [p for p in found if "unsupported" in p]
    assert "does not compile" in error and "fp8e4nv not supported" in error


WIDE = "aot_examples/wide"


def as_family(result, **changes):
    """The good example kernels as a family of their own, with changed figures; ``more_registers`` is added."""
    more = changes.pop("more_registers", 0)
    kept = [r for r in result["records"] if r["case"] in ("wide", "tile")]
    records = [{**r, "family": "good", "registers": r["registers"] + more, **changes} for r in kept]
    known = {key: result["known"]["file"][key] for key in ("aot_examples/wide", "aot_examples/tile")}
    binaries = {key: result["binaries"]["file"][key] for key in (f"{WIDE}/scale", "aot_examples/tile/matmul")}
    new = {"known": {"good": known}, "binaries": {"good": binaries}, "kernels": ["matmul", "scale"]}
    return {**result, "records": records, "uncovered": [], "family": "good", **new}


def test_kernels_that_cannot_launch_are_reported(examples, tmp_path):
    def found(**changes):
        return {p.split(": ", 1)[1] for p in aot.problems(as_family(examples, **changes), Path("/nonexistent"))}

    assert found() == found(shared=64 * 1024, tensor_memory=512) == set()
    assert found(shared=200 * 1024) == {
        "cannot launch, 204800 bytes of shared memory, 166912 there",
        "cannot launch, 204800 bytes of shared memory, 65536 there",
    }
    assert found(tensor_memory=513) == {"cannot launch, 513 tensor memory columns, 512 there"}


def test_baseline(examples, tmp_path):
    good = as_family(examples)
    assert all("not in good.json" in p for p in aot.problems(good, tmp_path))
    (path,) = aot.write_baseline(good, tmp_path)
    assert path == tmp_path / "good.json" and aot.problems(good, tmp_path) == []
    text = path.read_text()
    aot.write_baseline(good, tmp_path)
    assert path.read_text() == text

    def worse(**changes):
        return aot.problems(as_family(examples, **changes), tmp_path)

    assert worse(more_registers=aot.REGISTER_SLACK) == []
    assert len(worse(more_registers=aot.REGISTER_SLACK + 1)) == len(good["records"])
    assert any(p.endswith("wide/scale on sm_90: registers 14 -> 90") for p in worse(registers=90))
    assert any(p.endswith("wide/scale on sm_90: shared 0 -> 64") for p in worse(shared=64))
    assert any("loads_128 1 -> 0" in p for p in worse(loads_128=0))
    assert any("stores_128 1 -> 0" in p for p in worse(stores_128=0))
    assert worse(loads_128=0, stores_128=0, bulk_copies=1) == []
    assert any("matrix instructions {'HGMMA': 4} -> none" in p for p in worse(matrix={}))
    # another compiler's register counts say nothing, a lost wide access does
    newer = {**as_family(examples, registers=200, loads_128=0), "triton": "99.0"}
    assert {p.split(": ")[1] for p in aot.problems(newer, tmp_path)} >= {"loads_128 1 -> 0"}
    assert not any("registers" in p for p in aot.problems(newer, tmp_path))
    # not every case is compiled in a quick run, but every case is known: one that went away is stale
    fewer = {**good, "records": [r for r in good["records"] if r["case"] != "wide"]}
    assert aot.problems(fewer, tmp_path) == []
    gone = {**fewer, "known": {"good": {"aot_examples/tile": ["sm_80", "sm_90", "sm_100", "gfx942"]}}}
    gone["binaries"] = {"good": {"aot_examples/tile/matmul": good["targets"]}}
    assert [p for p in aot.problems(gone, tmp_path) if "sm_9" in p] == [
        "good/aot_examples/wide/scale on sm_90: in the baseline but no longer compiled",
    ]
    aot.write_baseline(fewer, tmp_path)
    assert path.read_text() == text
    aot.write_baseline(gone, tmp_path)
    assert set(aot.read_baseline("good", tmp_path)["kernels"]) == {"aot_examples/tile/matmul"}


def test_only_first_cases_must_be_in_the_baseline(examples, tmp_path):
    aot.write_baseline(as_family(examples), tmp_path)
    (tmp_path / "good.json").write_text('{"triton": null, "nvcc": null, "kernels": {}}')
    good = as_family(examples)
    assert len(aot.problems(good, tmp_path)) == len(good["records"])
    assert aot.problems(as_family(examples, first=False), tmp_path) == []


def test_allowed_spill_still_has_a_baseline(examples, tmp_path):
    def result(**changes):
        record = {**find(examples, "spilling", "sm_80"), "family": "good", "allow_spill": "a test", **changes}
        there = {"known": {"good": {"aot_examples/spilling": ["sm_80"]}}}
        there["binaries"] = {"good": {"aot_examples/spilling/matmul": ["sm_80"]}}
        return {**as_family(examples), "records": [record], **there}

    aot.write_baseline(result(), tmp_path)
    assert aot.problems(result(), tmp_path) == []
    spills = result()["records"][0]["spills"]
    assert aot.problems(result(spills=spills + 1), tmp_path) == [
        f"good/aot_examples/spilling/matmul on sm_80: spills {spills} -> {spills + 1}"
    ]


def test_rows_of_kernels_that_are_gone_are_reported(examples, tmp_path):
    good = as_family(examples)
    aot.write_baseline(good, tmp_path)
    only = {**good, "targets": ["sm_90"], "records": [r for r in good["records"] if r["target"] == "sm_90"]}
    assert aot.problems(only, tmp_path) == []
    binaries = {"aot_examples/tile/matmul": ["sm_90"]}
    # its case launches it no longer; what the other targets do was not looked at
    tile = [r for r in only["records"] if r["case"] == "tile"]
    gone = {**only, "records": tile, "binaries": {"good": binaries}}
    stale = "good/aot_examples/wide/scale on {}: in the baseline but no longer compiled"
    assert aot.problems(gone, tmp_path) == [stale.format("sm_90")]
    # no module launches it: stale on every target, whatever is compiled
    gone["kernels"] = ["matmul"]
    assert aot.problems(gone, tmp_path) == [stale.format(t) for t in ("gfx942", "sm_100", "sm_80", "sm_90")]
    # a run of another op says nothing about it, and keeps it
    other = {**gone, "op": "another"}
    assert aot.problems(other, tmp_path) == []
    aot.write_baseline(other, tmp_path)
    assert set(aot.read_baseline("good", tmp_path)["kernels"]) == {
        "aot_examples/wide/scale",
        "aot_examples/tile/matmul",
    }
    aot.write_baseline(gone, tmp_path)
    assert set(aot.read_baseline("good", tmp_path)["kernels"]) == {"aot_examples/tile/matmul"}


def test_baseline_of_other_targets_and_backends_is_kept(examples, tmp_path):
    good = as_family(examples)
    cuda = {**good, "nvcc": "13.0", "records": [{**good["records"][0], "backend": "cuda", "case": "k<float>"}]}
    aot.write_baseline(cuda, tmp_path)
    aot.write_baseline({**good, "nvcc": None}, tmp_path)
    kernels = aot.read_baseline("good", tmp_path)["kernels"]
    assert set(kernels) == {"aot_examples.cu/k<float>", "aot_examples/wide/scale", "aot_examples/tile/matmul"}
    assert aot.read_baseline("good", tmp_path)["nvcc"] == "13.0"
    only = {**good, "records": [r for r in good["records"] if r["target"] == "sm_90"]}
    aot.write_baseline(only, tmp_path)
    assert set(aot.read_baseline("good", tmp_path)["kernels"]["aot_examples/wide/scale"]) == {
        r["target"] for r in good["records"]
    }
    # but the figures of two compilers do not mix
    aot.write_baseline({**only, "triton": "99.0"}, tmp_path)
    assert set(aot.read_baseline("good", tmp_path)["kernels"]["aot_examples/wide/scale"]) == {"sm_90"}


def test_baselines_are_up_to_date_with_the_families():
    for path in aot.BASELINE_DIR.glob("*.json"):
        assert path.stem in FAMILIES
        assert set(json.loads(path.read_text())) == {"triton", "nvcc", "kernels"}


def test_a_case_names_targets_that_exist():
    with pytest.raises(ValueError, match=r"aot case bad: targets must be of .*, got \['sm_42'\]"):
        aot.AotCase("bad", None, targets=("sm_90", "sm_42")).check()


def test_names_of_cases_differ():
    module = types.SimpleNamespace(__name__="twice", aot_cases=lambda: [aot.AotCase("c", None)] * 2)
    with pytest.raises(ValueError, match=r"twice: aot cases must have different names, got \['c'\]"):
        aot.cases(module)


def test_expected_instructions_by_kernel_and_target():
    def expected(expect, target, kernel="k"):
        return aot.AotCase("c", None, expect=expect).expected(kernel, target)

    assert expected((), "sm_90") == ()
    assert expected(("MMA",), "sm_90") == ("MMA",)
    assert expected(("MMA",), "gfx942") == ()
    by_target = {"sm_90": ("HGMMA",), "nvidia": ("MMA",), "gfx942": ("MFMA",), "plain": ()}
    assert [expected(by_target, t) for t in ("sm_90", "sm_80", "gfx942")] == [("HGMMA",), ("MMA",), ("MFMA",)]
    assert [expected(by_target, t, "plain") for t in ("sm_90", "gfx942")] == [(), ("MFMA",)]
    assert expected({"sm_90": ("HGMMA",)}, "sm_100") == ()


@needs_triton
def test_what_is_compiled_ahead_is_what_a_launch_takes_from_the_cache():
    """Recorded on fake tensors against Triton's launcher on real ones: source, types, alignment, constants, options."""
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("aot_launches.py")), "keys"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    same = json.loads(process.stdout)
    assert {name.split("/")[0] for name in same} == set(FAMILIES)
    assert [name for name, equal in same.items() if not equal] == []


def test_instructions_are_counted_with_predicates_and_without_data():
    text = """
    .section  .text.kernel,"ax",@progbits
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0030*/             @!UP1 UTMALDG.2D [UR8], [UR6] ;
        /*0040*/               @P2 STL.64 [R1+0x8], R2 ;
        /*0050*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
    .section  .text.other,"ax",@progbits
        /*0000*/                   EXIT ;
    """
    functions = binaries.read_sass(text)
    assert set(functions) == {"kernel", "other"} and functions["other"].mnemonics == ["EXIT"]
    figures = binaries.summary(Counter(functions["kernel"].mnemonics))
    expected = {"loads_128": 2, "loads_16": 1, "bulk_copies": 1, "spills": 1, "stores_128": 0, "matrix": {}}
    assert figures == expected


# a loop over tiles around a loop over keys, a wait, and a block past the exit that comes back
LOOPS = """
    .section  .text.kernel,"ax",@progbits
        /*0000*/                   STL [R1], R2 ;
    .L_x_0:
        /*0010*/                   {outer} ;
    .L_x_1:
        /*0020*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0030*/                   {inner} ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
    .L_x_2:
        /*0050*/                   {wait} ;
        /*0060*/              @!P1 BRA `(.L_x_2) ;
    .L_x_3:
        /*0070*/                   LDS R4, [R2] ;
        /*0080*/               @P2 BRA `(.L_x_0) ;
        /*0090*/                   LDL R2, [R1] ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   {rare} ;
        /*00c0*/                   BRA `(.L_x_3) ;
"""


@pytest.mark.parametrize("place, counted", [("outer", 0), ("inner", 1), ("wait", 0), ("rare", 0)])
def test_spills_count_where_they_cost(place, counted):
    places = dict.fromkeys(("outer", "inner", "wait", "rare"), "IADD3 R2, R2, R3, RZ") | {place: "LDL R5, [R1+0x8]"}
    (code,) = binaries.read_sass(LOOPS.format(**places)).values()
    assert len(code.spills) == 3 and code.loop_spills() == counted


@pytest.mark.parametrize("spilled", ["v_mov_b32_e32 v2, v3", "scratch_load_dword v2, off, off ; 4-byte Folded Reload"])
def test_spills_in_loops_of_amd(spilled):
    text = f"""
\tscratch_store_dword off, v2, off ; 4-byte Folded Spill
.LBB0_1:
\tglobal_load_dwordx4 v[4:7], v[8:9], off
\t{spilled}
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
    .vgpr_spill_count: 1
"""
    figures = binaries._read_amdgcn(text)
    assert (figures["spills"], figures["loop_spills"]) == (1, int("scratch" in spilled))


def test_few_spills_outside_of_loops_are_no_problem(examples):
    def found(**changes):
        record = {**find(examples, "wide", "sm_80"), "family": "good", **changes}
        return aot.problems({**as_family(examples), "records": [record]}, Path("/nonexistent"))

    clean = found()
    assert found(spills=32, stack=64, loop_spills=0) == clean
    for bad in ({"spills": 33, "loop_spills": 0}, {"spills": 2, "loop_spills": 1}, {"stack": 8, "spills": 0}):
        assert len(found(**bad)) == len(clean) + 1
        assert found(**bad, allow_spill="a test") == clean


@pytest.mark.parametrize(
    "name, short",
    [
        ("void tilefuse::rope_kernel<__nv_bfloat16, 8>(__nv_bfloat16 const*, long)", "rope_kernel<__nv_bfloat16, 8>"),
        ("tilefuse::(anonymous namespace)::fill(int*)", "fill"),
        ("void tilefuse::map<tilefuse::bf16, (tilefuse::Mode)1>(int)", "map<bf16, (Mode)1>"),
        ("kernel", "kernel"),
    ],
)
def test_names_of_cuda_kernels(name, short):
    assert binaries.short_name(name) == short


def test_cubin_of_nvcc(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None or emulation._cuda_include() is None or not binaries.can_read():
        pytest.skip("needs nvcc, cuobjdump and nvdisasm")
    source = tmp_path / "k.cu"
    source.write_text(
        """
        __global__ void copy(const float4* x, float4* out) { out[threadIdx.x] = x[threadIdx.x]; }
        __global__ void local(const float* x, float* out, int n) {
          float values[64];
          for (int i = 0; i < n; ++i) values[i * 7 % 64] = x[i];
          out[threadIdx.x] = values[threadIdx.x % 64];
        }
        """
    )
    command = [nvcc, "-cubin", "-arch=sm_90", "-o", str(tmp_path / "k.cubin"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    found = binaries.read_cubin(tmp_path / "k.cubin")
    copy, local = (found[next(n for n in found if k in n)] for k in ("copy", "local"))
    assert (copy["loads_128"], copy["stores_128"], copy["stack"], copy["spills"]) == (1, 1, 0, 0)
    # an array indexed at run time lives in local memory: as slow as a spill, and found like one
    assert local["stack"] >= 256 and local["spills"] > 0


@needs_triton
def test_inspect_command(capsys):
    code = main(["inspect", "--json", "--file", str(EXAMPLES), "--target", "sm_90"])
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert code == 1 and {r["case"] for r in result["records"]} == {"wide", "narrow", "tile"}
    assert result["problems"] == [
        "file/aot_examples: forgotten is launched but compiled by no aot case",
        "file/aot_examples/narrow/scale on sm_90: no LDG.128",
    ]
    assert "4 HGMMA" in captured.err


@needs_triton
@pytest.mark.parametrize("op", ["merge_attention", "rope_qk"])
def test_inspect_one_op(capsys, op):
    # the second one is in the module of rope
    module = tilefuse.ops()[op].module.split("/")[1]
    code = main(["inspect", "--json", "--op", op, "--target", "sm_90", "--quick"])
    result = json.loads(capsys.readouterr().out)
    assert code == 0 and {r["op"] for r in result["records"]} == {module}


@needs_triton
def test_a_file_that_compiles_nothing_fails(capsys, tmp_path):
    file = tmp_path / "empty_gate.py"
    file.write_text("x = 1\n")
    assert main(["inspect", "--json", "--file", str(file), "--target", "sm_90"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == ["nothing was compiled"]
    file.write_text(
        "from tilefuse.testing.aot import AotCase\n\ndef aot_cases():\n    yield AotCase('idle', lambda: None)\n"
    )
    with pytest.raises(RuntimeError, match="aot case empty_gate/idle launches no kernel on sm_90"):
        aot.records(file=file, targets=("sm_90",))


def test_files_of_packages_are_imported_as_their_modules(tmp_path, monkeypatch):
    if triton_missing():
        pytest.skip(triton_missing())
    monkeypatch.setattr(sys, "path", [*sys.path])
    package = tmp_path / "gatepackage" / "inner"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    (package.parent / "sizes.py").write_text("SIZE = 64\n")
    (package / "gate.py").write_text("from ..sizes import SIZE\n")
    ((family, op, module),) = from_file(package / "gate.py")
    assert (family, op, module.__name__, module.SIZE) == ("file", "gate", "gatepackage.inner.gate", 64)
    from tilefuse.triton_kernels.moe import moe_combine

    ((_, op, module),) = from_file(moe_combine.__file__)
    assert op == "moe_combine" and module is moe_combine


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--target", "sm_1"], "--target must be one of"),
        (["--family", "nope"], "no kernels in family 'nope'"),
        (["--op", "nope"], "no kernels in op 'nope'"),
    ],
)
@needs_triton
def test_inspect_usage_errors(capsys, arguments, message):
    assert main(["inspect", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_unimportable_file_is_an_error(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('kaputt')\n")
    if triton_missing():
        pytest.skip(triton_missing())
    with pytest.raises(RuntimeError, match="kaputt"):
        aot.records(file=broken)
