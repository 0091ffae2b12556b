"""The wheel holds the tree, and both ways of installing import ``lp_plugin.integrations``."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().splitlines():  # a build folder left in the tree must not leak into the wheel
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        original = ROOT / name
        if original.is_symlink():
            target.symlink_to(original.readlink())
        elif original.is_file():
            target.write_bytes(original.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_file_of_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    core = [
        path for path in (ROOT / "lp_plugin").rglob("*") if path.suffix in {".py", ".toml"} or path.name == "py.typed"
    ]
    expected = {str(path.relative_to(ROOT)) for path in core if "integrations" not in path.parts}
    expected |= {f"lp_plugin/{path.relative_to(ROOT)}" for path in (ROOT / "integrations").rglob("*.py")}
    assert packed == expected


def test_the_wheel_imports_without_the_tree(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import lp_plugin.integrations.deepspeed.config as c; print(c.__file__); import lp_plugin"
    environment = {"PYTHONPATH": str(tmp_path), "DS_ACCELERATOR": "cpu", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [
            sys.executable,
            "-S",
            "-c",
            f"import sys; sys.path += {sys.path!r}; {code}; lp_plugin.Cluster.parse('h200:2')",
        ],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


def test_the_modules_exist_only_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import integrations"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "import lp_plugin.integrations" in done.stderr
