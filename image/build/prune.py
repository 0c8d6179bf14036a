"""Makes an installed environment small and ready for a read-only file system; the image's build runs it.

Deletes what neither training, evaluation nor TensorBoard touches, strips debug symbols, compiles the bytecode, and
sets every time stamp to one value, so that the same packages give the same bytes. Licences and metadata stay.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import py_compile
import shutil
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

# Patterns below site-packages, each with its reason.
ALWAYS = {
    "torch/test": "compiled tests of torch",
    "torch/include": "C++ headers: no compiler here",
    "torch/share": "CMake files",
    "torch/bin/test_*": "compiled tests of torch",
    "torch/bin/*Test": "compiled tests of torch",
    "torch/bin/protoc*": "the protocol buffers compiler",
    "torch/lib/*.a": "static libraries",
    "torch/lib/libtorchbind_test.so": "compiled tests of torch",
    "torch/lib/libjitbackend_test.so": "compiled tests of torch",
    "torch/lib/libbackend_with_compiler.so": "compiled tests of torch",
    "torch/lib/libaoti_custom_ops.so": "compiled tests of torch",
    "torch/testing/_internal/common_methods_invocations.py": "torch's table of operator tests",
    "torch/testing/_internal/opinfo": "torch's table of operator tests",
    "torch/testing/_internal/generated": "torch's generated tests",
    "numpy/_core/include": "C headers: no compiler here",
    "numpy/_core/lib/*.a": "static libraries",
    "numpy/random/lib/*.a": "static libraries",
    "numpy/f2py": "compiles Fortran",
    "numpy/distutils": "compiles extensions",
    "fontTools/feaLib": "font editing",
    "fontTools/varLib": "font editing",
    "fontTools/qu2cu": "font editing",
    "fontTools/cu2qu": "font editing",
    "fontTools/misc/bezierTools*": "font editing",
    "sympy/physics": "formulas of physics",
    "tzdata": "time zones: the base has them",
    "tzdata-*.dist-info": "time zones: the base has them",
    "matplotlib/mpl-data/sample_data": "sample pictures",
    "matplotlib/mpl-data/fonts/afm": "fonts of PostScript output",
    "matplotlib/mpl-data/fonts/pdfcorefonts": "fonts of PDF output",
    "matplotlib/mpl-data/images": "icons of windows",
    "**/tests": "tests",
    "**/*.pyi": "type stubs",
    "**/*.pxd": "Cython declarations",
    "**/*.h": "C headers: no compiler here",
    "setuptools": "builds packages",
    "setuptools-*.dist-info": "builds packages",
    "_distutils_hack": "builds packages",
    "distutils-precedence.pth": "builds packages",
    "pkg_resources": "builds packages",
}
# A torchvision of the CUDA build beside a CPU torch carries these, and can't load them.
CPU_ONLY = {
    "torchvision.libs/libnvjpeg*": "CUDA library",
    "torchvision.libs/libcudart*": "CUDA library",
}
# Packages that this program needs at run time in files the patterns would take.
KEEP = ("triton/",)


def site_packages(prefix: Path) -> Path:
    found = sorted(prefix.glob("lib/python3.*/site-packages"))
    if len(found) != 1:
        sys.exit(f"error: {prefix} is not an environment: {len(found)} site-packages folders in it")
    return found[0]


def size(path: Path) -> int:
    """Bytes on disk, as du counts them."""
    own = path.lstat().st_blocks * 512
    return own + (sum(size(child) for child in path.iterdir()) if path.is_dir() and not path.is_symlink() else 0)


def prune(site: Path, patterns: dict[str, str]) -> Counter[str]:
    """Delete what the patterns name; bytes freed by reason."""
    freed: Counter[str] = Counter()
    for pattern, reason in patterns.items():
        for path in sorted(site.glob(pattern)):
            if path.relative_to(site).as_posix().startswith(KEEP) or not path.exists():
                continue
            freed[reason] += size(path)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return freed


def is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def maps_to_pages(path: Path) -> bool:
    """Whether the loader can map the file: strip misplaces segments of libraries whose paths were patched."""
    data = path.read_bytes()
    table, entry, count = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54)
    for start in range(table, table + entry * count, entry):
        kind, _, offset, address = struct.unpack_from("<IIQQ", data, start)
        if kind == 1 and (offset - address) % 4096:  # PT_LOAD
            return False
    return True


def strip(prefix: Path) -> int:
    """Strip debug symbols and local symbol tables; bytes freed."""
    freed = 0
    for path in sorted(prefix.rglob("*")):
        if path.is_symlink() or not path.is_file() or path.stat().st_size < 65536 or not is_elf(path):
            continue
        stripped = path.with_name(f"{path.name}.stripped")
        command = ["strip", "--strip-unneeded", "-o", str(stripped), str(path)]
        subprocess.run(command, check=True, capture_output=True)
        if maps_to_pages(stripped):
            shutil.copymode(path, stripped)
            freed += size(path) - size(stripped)
            stripped.replace(path)
        else:
            stripped.unlink()
    return freed


def compile_bytecode(files: list[Path], elsewhere: Path | None = None) -> int:
    """Compile to bytecode that is valid whatever the source's time stamp is; bytes added.

    `elsewhere` takes bytecode in place of the files' own folders, under their full paths.
    """
    added = 0
    for file in files:
        cache = Path(importlib.util.cache_from_source(str(file)))
        if elsewhere is not None:
            cache = elsewhere / cache.relative_to("/")
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(str(file), cfile=str(cache), doraise=True, invalidation_mode=mode)
        added += size(cache)
    return added


def settle(prefix: Path, epoch: int) -> None:
    for path in [prefix, *prefix.rglob("*")]:
        os.utime(path, (epoch, epoch), follow_symlinks=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prefix", type=Path, help="the environment")
    parser.add_argument("--variant", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--warm", type=Path, help="script that prints the files to compile; default: compile all")
    parser.add_argument("--base-bytecode", type=Path, help="where to put the bytecode of files outside")
    parser.add_argument("--epoch", type=int, default=1_700_000_000, help="time stamp of every file, seconds since 1970")
    arguments = parser.parse_args()
    prefix = arguments.prefix
    site = site_packages(prefix)
    before = size(prefix)
    freed = prune(site, ALWAYS | (CPU_ONLY if arguments.variant == "cpu" else {}))
    freed["debug symbols and local symbol tables"] = strip(prefix)
    for reason, count in freed.most_common():
        if count >= 1e6:
            print(f"  -{count / 1e6:7.1f} MB  {reason}")
    if arguments.warm:
        command = [sys.executable, str(arguments.warm)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        files = [Path(line) for line in done.stdout.splitlines()]
    else:
        files = sorted(site.rglob("*.py"))
    added = compile_bytecode([file for file in files if file.is_relative_to(prefix)])
    if arguments.base_bytecode:
        arguments.base_bytecode.mkdir(parents=True, exist_ok=True)
        outside = [file for file in files if not file.is_relative_to(prefix) and file != arguments.warm.resolve()]
        added += compile_bytecode(outside, arguments.base_bytecode)
        settle(arguments.base_bytecode, arguments.epoch)
    print(f"  +{added / 1e6:7.1f} MB  bytecode")
    settle(prefix, arguments.epoch)
    print(f"{prefix}: {before / 1e6:.0f} MB -> {size(prefix) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
