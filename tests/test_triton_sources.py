"""What every Triton launcher and kernel keeps, read off their sources and off what they launch."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tilefuse import library
from tilefuse.backends import triton_missing

ROOT = Path(__file__).resolve().parent.parent / "triton_kernels"
FILES = sorted(ROOT.rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def with_parents(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node
    return tree


def ancestors(node):
    while hasattr(node, "parent"):
        node = node.parent
        yield node


@each_file
def test_launches_go_to_the_device_of_the_arguments(path):
    """``kernel[grid](...)`` would run on the current GPU, which need not be that of the tensors."""
    for node in ast.walk(with_parents(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and node.args:
            guards = [ast.unparse(item) for a in ancestors(node) if isinstance(a, ast.With) for item in a.items]
            assert any(g.startswith("on_device(") for g in guards), f"{path.name}:{node.lineno}"


def kernel_names(path):
    """Names of the kernels that a file launches."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            yield ast.unparse(node.func.value)


# of several kernel ops, called as the ops' module
SHARED = ("rope_kernel", "mla_absorb_query_kernel", "grouped_matmul_gather_kernel")


@each_file
def test_kernels_are_called_as_their_kernel_ops(path):
    """What a profile shows leads to the op: CONTRIBUTING's dialect."""
    module = f"{path.parent.name}/{path.stem}"
    ops = [name for name, kernel in library.kernels().items() if kernel.module == module]
    for name in kernel_names(path):
        assert name in SHARED or re.fullmatch(rf"({'|'.join(ops)})(_[a-z_]+)?_kernel", name), name


def is_dot(node):
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot"


def accumulated(statement):
    """Names that a statement adds a product to."""
    if isinstance(statement, ast.AugAssign) and any(map(is_dot, ast.walk(statement.value))):
        yield ast.unparse(statement.target)
    for node in ast.walk(statement) if isinstance(statement, ast.Assign) else ():
        if is_dot(node):
            yield from (ast.unparse(k.value) for k in node.keywords if k.arg == "acc")
            yield from map(ast.unparse, node.args[2:3])


def worst(body):
    """Most products that one pass through these statements adds to one name: {name: number}."""
    total = {}
    for statement in body:
        found = {}
        if isinstance(statement, ast.If):
            one, two = worst(statement.body), worst(statement.orelse)
            found = {name: max(one.get(name, 0), two.get(name, 0)) for name in {*one, *two}}
        elif not isinstance(statement, ast.For | ast.While):
            for name in accumulated(statement):
                found[name] = found.get(name, 0) + 1
        for name, number in found.items():
            total[name] = total.get(name, 0) + number
    return total


@pytest.mark.parametrize("path", sorted((ROOT / "moe").glob("*.py")), ids=lambda p: p.name)
def test_products_have_accumulators_of_their_own(path):
    """Two dots into one accumulator in a loop are miscompiled for sm_103 (Triton issue 10821)."""
    for loop in ast.walk(ast.parse(path.read_text())):
        if isinstance(loop, ast.For | ast.While):
            assert all(number <= 1 for number in worst(loop.body).values()), f"{path.name}:{loop.lineno}"


def test_the_rule_finds_two_products():
    one = "if k:\n    b = tl.dot(x, y, b)\nelse:\n    b += tl.dot(x, z)\na = tl.dot(x, y, acc=a)"
    assert worst(ast.parse(one).body) == {"a": 1, "b": 1}
    two = "a = tl.dot(x, y, a)\na = tl.dot(x, z, acc=a)\na += tl.dot(x, y)"
    assert worst(ast.parse(two).body) == {"a": 3}


# helpers whose results are int64
WIDE = ("source_rows", "_row_of")


def leftmost(node):
    """The name that a sum starts with: the pointer of a pointer expression."""
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        node = node.left
    node = node.value if isinstance(node, ast.Subscript) else node
    return node.id if isinstance(node, ast.Name) else None


def names(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def products(node):
    """Outermost products, not those inside of a call."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        yield node
    elif not isinstance(node, ast.Call):
        for child in ast.iter_child_nodes(node):
            yield from products(child)


def narrow_offsets(function):
    """Products in pointer expressions that nothing makes int64."""
    accesses = [
        call.args[0]
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("tl.load", "tl.store")
    ]
    pointers, wide = {leftmost(a) for a in accesses} - {None}, set()
    assigned = [(names(a.targets[0]), a.value) for a in ast.walk(function) if isinstance(a, ast.Assign)]
    for _ in range(4):
        for targets, value in assigned:
            if targets & pointers and leftmost(value):
                pointers.add(leftmost(value))
            if any(word in ast.unparse(value) for word in ("int64", *WIDE)) or names(value) & wide:
                wide |= targets
    for expression in (*accesses, *(value for targets, value in assigned if targets & pointers)):
        for product in products(expression):
            constants = all(name.isupper() for name in names(product))
            if not (constants or "int64" in ast.unparse(product) or names(product) & wide):
                yield ast.unparse(product)


@pytest.mark.parametrize("path", sorted((ROOT / "moe").glob("*.py")), ids=lambda p: p.name)
def test_offsets_are_64_bit(path):
    """Tokens times width, and experts times a matrix, pass 2^31 elements: every product in an address is int64."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and "triton.jit" in map(
            ast.unparse, function.decorator_list + [d.func for d in function.decorator_list if isinstance(d, ast.Call)]
        ):
            assert not list(narrow_offsets(function)), f"{path.name}: {function.name}"


def test_the_rule_finds_a_narrow_product():
    source = """
def kernel(x, out, stride, N: tl.constexpr):
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    x_at = x + {} * stride
    tl.store(out + wide * N, tl.load(x_at + 2 * N))
"""
    assert list(narrow_offsets(ast.parse(source.format("row")).body[0])) == ["row * stride"]
    assert not list(narrow_offsets(ast.parse(source.format("wide")).body[0]))


# constants that a launcher may choose by the size of a call: tiles, and whether it splits work
TILES = ("BLOCK_", "GROUP_M", "SWAP", "SPLIT", "VEC", "BALANCE", "DIRECT")


@pytest.mark.skipif(triton_missing() is not None, reason="nothing to compile with: Triton is not installed")
def test_lengths_batches_and_windows_compile_nothing_anew():
    """Each op launched with several: one binary for each dtype, width and set of flags, and for each tile."""
    process = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("aot_launches.py")), "binaries"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(process.stdout)
    launched = {kernel.rsplit("/", 1)[1] for kernel in found}
    assert {"rope_kernel", "grouped_matmul_fwd_kernel", "mla_decode_fwd_kernel", "fp8_matmul_fwd_kernel"} <= launched
    assert {kernel: kinds["arguments"] for kernel, kinds in found.items() if kinds["arguments"]} == {}
    others = {kernel: [n for n in kinds["constants"] if not n.startswith(TILES)] for kernel, kinds in found.items()}
    assert {kernel: names for kernel, names in others.items() if names} == {}


@each_file
def test_imports_are_relative_and_shared_layouts_come_from_the_host_module(path):
    """Launchers take layouts and checks from their family's ``host.py``, which alone knows the ops and references."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(name.name.split(".")[0] == "tilefuse" for name in node.names), f"{path.name}:{node.lineno}"
        elif isinstance(node, ast.ImportFrom):
            assert node.level or node.module.split(".")[0] != "tilefuse", f"{path.name}:{node.lineno}"
            shared = node.level == 3 and (node.module or "").split(".")[0] in ("ops", "reference")
            assert not shared or path.name == "host.py", f"{path.name}:{node.lineno}"
