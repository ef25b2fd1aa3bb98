"""The rules of the house: who may import what, and which file alone touches ranks and DALI."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def files_naming(words: tuple[str, ...]) -> set[str]:
    sources = [path for room in ("cup", "data", "launch", "train") for path in (ROOT / room).rglob("*.py")]
    return {str(path.relative_to(ROOT)) for path in sources if any(word in path.read_text() for word in words)}


def test_imports_only_go_down():
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_only_the_world_touches_the_process_group():
    assert files_naming(("torch.distributed", "DistributedDataParallel")) == {"train/world.py"}


def test_only_one_file_imports_dali():
    assert files_naming(("import nvidia", "from nvidia")) == {"data/dali.py"}


def test_importing_the_rooms_imports_neither_dali_nor_tensorboard():
    code = "import sys, cup, data, train.run; print([n for n in ('nvidia.dali', 'tensorboard') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_torch_never_unpickles():
    assert files_naming(("weights_only=False",)) == set()
    loading = files_naming(("torch.load(",))
    assert loading == {"train/checkpoint/archive.py", "train/world.py"}
    lines = [line for name in loading for line in (ROOT / name).read_text().splitlines() if "torch.load(" in line]
    assert all("weights_only=True" in line for line in lines)


def test_no_collective_pickles():
    assert files_naming(("_object(", "object_list(")) == set()


def test_reading_logs_needs_no_torch():
    code = "import sys, launch.report; print([n for n in ('torch', 'cup', 'data') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_ranks_times_wall_time_has_one_name():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "launch").rglob("*.html")]
    others = ("process hours", "Process hours", "rank hours", "'process'} hours")
    assert files_naming(others) == set()
    assert not [page.name for page in pages if any(name in page.read_text() for name in others)]
