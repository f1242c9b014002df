"""Builds the compiled extension ``harlora/kernels/_C.so``; everything else is in pyproject.toml.

The extension is plain shared-library code against libtorch's stable ABI, registered with torch's dispatcher and
loaded by ``torch.ops.load_library``: it needs neither Python's headers nor its ABI. Where it cannot be built (no
torch in the build environment, no ninja, no C++ compiler), the installation goes on with one warning, and the
operators run on their PyTorch reference.

Environment: CXX, the C++ compiler; CUDA_HOME, the CUDA toolkit (otherwise found through nvcc on PATH);
HARLORA_CUDA=0 leaves the CUDA part out; TORCH_CUDA_ARCH_LIST, as torch's extensions read it ("8.0;9.0a;10.0+PTX"), by
default all GPUs that the kernels are written for and the toolkit knows; HARLORA_WERROR=1 makes nvcc's warnings errors,
as this repository's own builds do. HARLORA_SANITIZE=1 compiles the CPU part with AddressSanitizer and UBSan, for
``make sanitize`` alone: what comes out loads only behind their runtime.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
SOURCES = ROOT / "csrc"
# Flags of the CPU kernels for one instruction set each; which of them runs is decided at run time.
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
VARIANTS = {
    "kernels_avx512": AVX512,
    "kernels_avx512bf16": f"{AVX512} -mavx512bf16",
    "kernels_avx2": "-mavx2 -mfma -mf16c",
}
X86 = platform.machine().lower() in {"x86_64", "amd64"}
# GPUs that the CUDA part is written for.
ARCHITECTURES = "8.0+PTX;8.6;8.9;9.0a;10.0a"
# The oldest torch that the stable ABI calls may come from: 2.10.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Every finding ends the process; frame pointers and -O1 make its report readable.
SANITIZE = os.environ.get("HARLORA_SANITIZE") == "1"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1"


class UnavailableError(Exception):
    """Why the extension, or a part of it, cannot be built here."""


def torch_folder() -> Path:
    """The installed torch, whose headers and libraries the extension uses."""
    try:
        import torch
    except ImportError as error:
        raise UnavailableError(
            "torch is not importable while building; install it first, then harlora with --no-build-isolation"
        ) from error
    return Path(torch.__file__).parent


def ninja_program() -> str:
    """The ninja program of the PyPI package, or the one on PATH."""
    beside = Path(sys.executable).parent / "ninja"
    if found := shutil.which(str(beside)) or shutil.which("ninja"):
        return found
    try:
        import ninja
    except ImportError as error:
        raise UnavailableError("ninja is missing: pip install ninja") from error
    return str(Path(ninja.BIN_DIR) / "ninja")


def cxx_program() -> str:
    """The C++ compiler, a command."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(shlex.split(name)[0]):  # such as ccache g++
            return name
    raise UnavailableError("no C++ compiler was found: install g++ or clang, or set CXX")


def cuda_folder() -> Path:
    """The root of the CUDA toolkit; nvcc on PATH may be a wrapper, so nvcc itself is asked where it lives."""
    if os.environ.get("HARLORA_CUDA", "1") == "0":
        raise UnavailableError("HARLORA_CUDA=0")
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise UnavailableError("no nvcc on PATH and CUDA_HOME is not set")
    said = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    if top is None:
        raise UnavailableError("nvcc does not tell where its toolkit is; set CUDA_HOME")
    return Path(top[1].strip()).resolve()


def architectures(cuda: Path) -> list[str]:
    """The options of nvcc for the GPUs that are built for. Raises: UnavailableError for a list that cannot be read."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").strip(";")
    if not given:
        # PTX of the oldest serves what comes after; the machine code of 9.0a and 10.0a serves no other GPU.
        said = subprocess.run([cuda / "bin" / "nvcc", "--list-gpu-code"], capture_output=True, text=True, check=False)
        known = said.stdout.split()
        given = ";".join(arch for arch in ARCHITECTURES.split(";") if f"sm_{number(arch).rstrip('af')}" in known)
    found = []
    for arch in filter(None, given.split(";")):
        name, _, ptx = arch.partition("+")
        if not re.fullmatch(r"\d+\.\d[af]?", name) or ptx not in ("", "PTX"):
            raise UnavailableError(f"TORCH_CUDA_ARCH_LIST must be numbers such as 8.0;9.0a;10.0+PTX, got {arch!r}")
        found.append(f"-gencode=arch=compute_{number(arch)},code=sm_{number(arch)}")
        if ptx:
            found.append(f"-gencode=arch=compute_{number(arch)},code=compute_{number(arch)}")
    return found


def number(arch: str) -> str:
    """9.0a+PTX as nvcc's names have it, 90a."""
    return arch.partition("+")[0].replace(".", "")


def ninja_file(torch: Path, cxx: str, cuda: Path | None, gencode: list[str], target: Path) -> str:
    """The build file that makes ``target``; gencode: nvcc's options for the GPUs."""

    def quoted(path: Path | str) -> str:  # as a path in a ninja file
        return re.sub(r"([$ :])", r"$\1", str(path))

    def flag(path: Path) -> str:  # as a word of a command in a ninja file
        return shlex.quote(str(path)).replace("$", "$$")

    common = f"-std=c++20 -O3 {STABLE_ABI} -I{flag(SOURCES)} -isystem {flag(torch / 'include')}"
    # Scales are a product and a sum, each rounded, as in the format's definition: no contraction.
    warnings = "-Wall -Wextra -Wno-psabi -Wno-uninitialized -Wno-maybe-uninitialized"  # GCC 12 about its own headers
    libraries = "-ltorch_cpu -lc10 -ldl"
    sanitizers = f" {SANITIZERS}" * SANITIZE
    lines = [
        f"cxxflags = {common} -fPIC -ffp-contract=off {warnings} -fvisibility=hidden"
        + " -DHARLORA_X86" * X86
        + sanitizers,
        f"ldflags = -shared -L{flag(torch / 'lib')} {libraries}{sanitizers}",
        f"rule cxx\n command = {cxx} $cxxflags $more -MMD -MF $out.d -c $in -o $out\n depfile = $out.d\n deps = gcc",
        f"rule link\n command = {cxx} $in $ldflags $cuda -o $out",
    ]
    objects: list[str] = []
    hopper = " -DHARLORA_SM90A" * (bool(cuda) and any("sm_90a" in each for each in gencode))
    sources = [SOURCES / "bindings.cpp", *sorted((SOURCES / "cpu").glob("*.cpp")), SOURCES / "gpu" / "launches.cpp"]
    for source in sources:
        if source.stem in VARIANTS and not X86:
            continue
        objects.append(f"{source.parent.name}_{source.stem}.o")
        lines.append(f"build {objects[-1]}: cxx {quoted(source)}")
        defined = " -DHARLORA_CUDA" * bool(cuda) + hopper
        lines.append(f" more = {VARIANTS.get(source.stem, '')}{defined}")
    if cuda:
        strict = "-Werror all-warnings " if os.environ.get("HARLORA_WERROR") == "1" else ""
        lines.append(
            f"rule nvcc\n command = {flag(cuda / 'bin' / 'nvcc')} {common} -DUSE_CUDA{hopper} "
            f"{' '.join(gencode)} "
            f"-Xcompiler -fPIC {strict}-Xptxas -v -MD -MF $out.d -c $in -o $out\n depfile = $out.d\n deps = gcc"
        )
        for source in sorted((SOURCES / "cuda").glob("*.cu")):
            objects.append(f"cuda_{source.stem}.o")
            lines.append(f"build {objects[-1]}: nvcc {quoted(source)}")
    lines.append(f"build {quoted(target)}: link {' '.join(objects)}")
    if cuda:
        lib = next((cuda / name for name in ("lib64", "lib") if (cuda / name).is_dir()), cuda / "lib64")
        lines.append(f" cuda = -L{flag(lib)} -lcudart_static -ldl -lrt -lpthread")
    return "\n".join(lines) + "\n"


class BuildWithNinja(build_ext):
    """Builds the extension with ninja, and lets the installation go on where that cannot be done."""

    def get_ext_filename(self, fullname: str) -> str:
        """A name without the Python version, since no Python symbol is in it."""
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._build(target)
        except (UnavailableError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)
            self.warn(f"harlora: the compiled extension is left out, the PyTorch reference is used ({error})")

    def _build(self, target: Path) -> None:
        torch, ninja, cxx = torch_folder(), ninja_program(), cxx_program()
        cuda: Path | None = None
        gencode: list[str] = []
        try:
            cuda = cuda_folder()
            gencode = architectures(cuda)
        except UnavailableError as reason:
            said = f"harlora: building without the CUDA part ({reason})"
            if cuda is None:
                self.announce(said, level=2)
            else:  # no toolkit is no mistake; a list that cannot be read is one
                self.warn(said)
            cuda = None
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in [cuda, None] if cuda else [None]:
            # Apart, so that no object of one can come into the other: sources know whether there is a CUDA part.
            folder = Path(self.build_temp).resolve() / ("harlora-cuda" if attempt else "harlora")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "build.ninja").write_text(ninja_file(torch, cxx, attempt, gencode, target))
            try:
                subprocess.run([ninja, "-C", str(folder)], check=True)
                break
            except subprocess.CalledProcessError:
                if attempt is None:
                    raise
                self.warn("harlora: the CUDA part does not compile with this toolkit and is left out; see above")
        if SANITIZE:
            return  # without the sanitizers' runtime before it, nothing can load it
        # An extension that does not load here is worse than none.
        check = f"import torch; torch.ops.load_library({str(target)!r})"
        with tempfile.TemporaryDirectory() as elsewhere:
            subprocess.run([sys.executable, "-c", check], check=True, cwd=elsewhere)

    def get_outputs(self) -> list[str]:
        """The files that were built; none where the build was not possible."""
        return [output for output in super().get_outputs() if Path(output).exists()]

    def copy_extensions_to_source(self) -> None:
        """For an editable installation; nothing to copy where the build was not possible."""
        for ext in self.extensions:
            built, inplace = Path(self.build_lib) / self.get_ext_filename(ext.name), ROOT / "kernels" / "_C.so"
            if built.exists():
                shutil.copyfile(built, inplace)
            else:
                inplace.unlink(missing_ok=True)


class PlatformWheel(bdist_wheel):
    """Tags the wheel as fit for every Python on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[Extension("harlora.kernels._C", sources=[])],
    cmdclass={"build_ext": BuildWithNinja, "bdist_wheel": PlatformWheel},
)
