"""The wheel and the sdist are whole: installed by pip into an empty environment, they do what the checkout does."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tarfile
import urllib.request
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(600)  # pip installs some hundred megabytes
ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "powerband"
BUILT_FROM = ("src", "pyproject.toml", "MANIFEST.in", "constraints.txt", "README.md", "CHANGELOG.md", "LICENSE")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("POWERBAND_", "PYTHON"))}
SMALL = ("--threads", "1", "--max-model-len", "512", "--kv-cache-memory", "32MiB")
PIP = ("-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check")
LOAD = ("--prompt-tokens", "32-128", "--output-tokens", "8-32")


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel in it, and a folder outside the checkout to run it in."""

    folder: Path
    bin: Path

    def run(self, program: str, *arguments: str) -> str:
        """What it printed to stdout. The test fails if the program does."""
        command = [str(self.bin / program), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=self.folder, env=ENVIRONMENT, timeout=280
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    @contextmanager
    def running(self, command: str, *arguments: str, probe_path: str) -> Iterator[str]:
        """The URL of a server that answers at probe_path; it ends with the block."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = self.folder / f"{command}.log"
        with log.open("wb") as written:
            process = subprocess.Popen(
                [str(self.bin / "powerband"), command, *arguments, "--port", str(port)],
                stdout=written,
                stderr=written,
                cwd=self.folder,
                env=ENVIRONMENT,
            )
        url = f"http://127.0.0.1:{port}"
        try:
            self.run("python", "-c", WAIT, f"{url}{probe_path}", str(process.pid))
            yield url
        finally:
            process.terminate()
            process.wait(timeout=60)
        assert process.returncode == 0, log.read_text()


# Connects again and again until the server says that it is ready, or its process is gone.
WAIT = """
import os, sys, time, urllib.error, urllib.request
while True:
    os.kill(int(sys.argv[2]), 0)
    try:
        urllib.request.urlopen(sys.argv[1], timeout=5).close()
        break
    except (urllib.error.URLError, ConnectionError):
        time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """An environment with pip."""
    folder = tmp_path_factory.mktemp("tools")
    venv.create(folder / "env", with_pip=True)
    return Installed(folder, folder / "env" / "bin")


@pytest.fixture(scope="module")
def built(tools: Installed) -> tuple[Path, Path]:
    """(wheel, sdist), built as `make wheel` does, from a copy, so that nothing lies about in the checkout."""
    folder = tools.folder
    source = folder / "source"
    source.mkdir()
    for name in BUILT_FROM:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    for leftover in (*source.glob("src/*.egg-info"), *source.rglob("__pycache__")):
        shutil.rmtree(leftover)
    tools.run("python", *PIP, "build")
    tools.run("python", "-m", "build", "--outdir", str(folder / "dist"), str(source))
    [wheel], [sdist] = folder.glob("dist/*.whl"), folder.glob("dist/*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(tools: Installed, built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """What `pip install powerband-….whl` makes of an empty environment: no extra, so no torch."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env")
    constraints = ("-c", str(ROOT / "constraints.txt"))
    tools.run("python", "-m", "pip", "--python", str(folder / "env"), *PIP[2:], *constraints, str(built[0]))
    return Installed(folder, folder / "env" / "bin")


def files_of_the_package() -> set[str]:
    found = {str(path.relative_to(PACKAGE.parent)) for path in PACKAGE.rglob("*") if path.is_file()}
    return {name for name in found if "__pycache__" not in name}


def test_every_file_of_the_package_is_in_the_wheel_and_the_sdist(built: tuple[Path, Path]) -> None:
    wheel, sdist = built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if name.startswith("powerband/")} == files_of_the_package()
    with tarfile.open(sdist) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    assert {f"src/{name}" for name in files_of_the_package()} <= inside
    assert not [name for name in inside if name.startswith("tests")]


def test_plans_memory_and_gateway_without_torch(installed: Installed) -> None:
    installed.run("python", "-c", "import powerband, importlib.util as u; assert u.find_spec('torch') is None")
    assert installed.run("powerband", "--version").startswith("powerband ")
    plan = ("--devices", "L4", "--rate", "0.2", *LOAD, "-o", "plan.yaml", "--html", "plan.html")
    assert "chosen" in installed.run("powerband", "plan", "demo", *plan)
    assert (installed.folder / "plan.html").stat().st_size > 100_000, "the page holds its scripts"
    assert "KV cache" in installed.run("powerband", "memory", "demo")
    routes = installed.folder / "routes.yaml"
    routes.write_text("revision: '1'\nmodels: [{name: demo, replicas: []}]\n")
    database = str(installed.folder / "gateway.db")
    with installed.running("gateway", "--routes", str(routes), "--database", database, probe_path="/livez") as url:
        assert b"powerband_" in urllib.request.urlopen(f"{url}/metrics").read()


def test_it_serves_and_benches_the_demo_model(installed: Installed) -> None:
    """torch is that of the environment which runs the tests; everything else was installed by pip."""
    torch = find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    [packages] = (installed.bin.parent / "lib").glob("python*/site-packages")
    (packages / "torch.pth").write_text(f"{Path(torch.origin).parents[1]}\n")
    where = installed.run("python", "-c", "import powerband, torch; print(powerband.__file__)")
    assert Path(where.strip()).is_relative_to(packages)
    assert "C++ kernels (" in installed.run("powerband", "doctor", "--compile")
    with installed.running("serve", "demo", *SMALL, probe_path="/readyz") as url:
        bench = ("--concurrency", "2", "--requests", "8", *LOAD, "--out", "result")
        installed.run("powerband", "bench", url, *bench)
    assert (installed.folder / "result/report.html").stat().st_size > 100_000, "the page holds its scripts"
