"""What the compiler made of the cluster kernels, read from the module: registers, stack, forms."""

import re
import subprocess
from pathlib import Path

import pytest

from fastrssm import _native

KERNELS = [f"rssm_{way}_kernelILi{tiles}E" for way in ("forward", "backward") for tiles in (1, 2)]
# sizes of AIME's models and of DreamerV3's smallest, as in Plan.structure up to the head
RSSM = (512, 128, 6, 1, 0, 0, 0, 0, 3, 128)
RSSMO = (512, 30, 6, 1, 0, 1, 0, 512, 2, 512)
RSSMO_V2 = (512, 30, 6, 1, 1, 1, 0, 512, 2, 512)
DREAMER = (512, 128, 6, 32, 3, 1, 1, 0, 2, 64)
# the rest of it: AIME's policy; an actor of DreamerV3, in imagination
PLAIN, POLICY, ACTOR = (0, 0, 1, 0), (3, 128, 1, 0), (4, 64, 0, 0)
SHARED_LIMIT = 232448


@pytest.fixture(scope="module")
def disassemble():
    if not hasattr(_native, "rssm_cluster_run"):
        pytest.skip("the module was built without CUDA")
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this triton has no cuobjdump")

    def run(*options):
        command = [tool, *options, _native.__file__]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return run


def test_no_kernel_spills(disassemble):
    usage = disassemble("-arch", "sm_90a", "--dump-resource-usage")
    found = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    for kernel in KERNELS:
        (numbers,) = [tuple(map(int, rest)) for name, *rest in found if kernel in name]
        registers, stack, local = numbers
        # 65,536 registers for 384 threads
        assert registers <= 168, kernel
        assert (stack, local) == (0, 0), kernel


@pytest.fixture(scope="module")
def code(disassemble):
    """The instructions of each kernel."""
    text = disassemble("-arch", "sm_90a", "-sass")
    parts = re.split(r"Function : (\S+)", text)
    named = dict(zip(parts[1::2], parts[2::2], strict=True))
    found = {}
    for kernel in KERNELS:
        (name,) = [name for name in named if kernel in name]
        found[kernel] = re.findall(
            r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\d+ +)?([A-Z][\w.]*)", named[name]
        )
    return found


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_fence_of_the_device_stands_in_the_loop(code, kernel):
    instructions = code[kernel]
    waits = [i for i, form in enumerate(instructions) if "TRYWAIT" in form]
    assert waits
    # a cluster's barrier, with its fence and its loss of the cache, before the loop and behind it
    assert instructions.count("UCGABAR_ARV") == 2
    assert sum(form.startswith("UCGABAR_WAIT") for form in instructions) == 2
    loop = instructions[waits[0] : waits[-1] + 1]
    forbidden = ("MEMBAR.ALL.GPU", "MEMBAR.SC.GPU", "CCTL", "UCGABAR", "ATOM", "RED")
    assert [form for form in loop if form.startswith(forbidden)] == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_products_and_stores_have_the_wanted_forms(code, kernel):
    instructions = code[kernel]
    assert instructions.count("HMMA.16816.F32.BF16") >= 24
    assert any(form.startswith("STAS.128") for form in instructions)
    # asynchronous loads into shared memory
    assert any(form.startswith("LDGSTS") for form in instructions)
    assert not any(form.startswith(("LDL", "STL")) for form in instructions)


def test_other_architectures_have_none_of_it(disassemble):
    text = disassemble("--dump-resource-usage")
    for part in re.split(r"arch = ", text)[1:]:
        if not part.startswith("sm_90"):
            assert "rssm_forward_kernel" not in part
            assert "rssm_backward_kernel" not in part


@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("sizes", [RSSM, RSSMO, RSSMO_V2], ids=["rssm", "rssmo", "rssmo_v2"])
@pytest.mark.parametrize("policy", [PLAIN, POLICY], ids=["observe", "policy"])
def test_published_sizes_fit(sizes, policy, backward, rows):
    if not hasattr(_native, "rssm_cluster_run"):
        pytest.skip("the module was built without CUDA")
    why = _native.rssm_cluster_refusal([50, 50, *sizes, *policy, 0, 0], backward, 16, rows)
    # 16 rows are too many where weights fill the memory
    assert ("shared memory" in why) == (rows == 16 and sizes is not RSSM)
    assert bool(why) == ("shared memory" in why)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("policy", [PLAIN, ACTOR], ids=["observe", "actor"])
def test_dreamers_smallest_size_fits_half_a_cluster(policy, backward):
    if not hasattr(_native, "rssm_cluster_run"):
        pytest.skip("the module was built without CUDA")
    head = 3 if policy is ACTOR else 2
    layout = [50, 50, *DREAMER[:8], head, 64, *policy, 8, 64]
    for rows in (8, 16):
        assert _native.rssm_cluster_refusal(layout, backward, 8, rows) == ""


def test_a_layout_of_another_length_is_refused():
    if not hasattr(_native, "rssm_cluster_run"):
        pytest.skip("the module was built without CUDA")
    with pytest.raises(ValueError, match="layout has 16 numbers, expected 18"):
        _native.rssm_cluster_refusal([50, 50, *RSSM, *PLAIN], False, 16, 8)
