"""Build the CPU libraries: the same C++ sources, compiled once for each instruction set.

They are plain shared libraries with a C interface (mambakit/ops/_native.py loads one of them),
not Python modules: they need neither Python's nor torch's headers, and one wheel serves every
Python version. A machine that cannot build them still installs the package; the reason is left
beside the code, where ``mambakit doctor`` finds it.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError, LinkError, PlatformError

OPS = "src/mambakit/ops"
SOURCES = (OPS, "src/mambakit/generation/cpu_step")
MISSING = "_cpu_missing.txt"

# x86-64 only. Elsewhere the compiler's default target is used: on arm64 that includes NEON.
X86_FLAGS = {
    "avx512": [
        "-mavx512f",
        "-mavx512dq",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx2",
        "-mfma",
        "-mf16c",
    ],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "baseline": ["-msse4.2"],
}

# No -ffast-math: a NaN must stay a NaN. Errno and traps are never read, which lets loops
# vectorise. Hidden symbols: two libraries may be loaded at once and must not share names.
FLAGS = [
    "-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno",
    "-fno-trapping-math", "-ffp-contract=fast", "-fno-exceptions", "-fno-rtti", "-Wall",
    "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas",
]  # fmt: skip


def instruction_sets() -> dict[str, list[str]]:
    machine = platform.machine().lower()
    if machine in {"x86_64", "amd64"}:
        return X86_FLAGS
    return {"neon" if machine in {"arm64", "aarch64"} else "baseline": []}


def extensions() -> list[Extension]:
    sources, headers = (
        sorted(str(path) for folder in SOURCES for path in Path(folder).glob(pattern))
        for pattern in ("**/*.cpp", "**/*.h")
    )
    return [
        Extension(
            f"mambakit.ops._cpu_{name}",
            sources,
            depends=headers,
            extra_compile_args=[*FLAGS, *flags],
            language="c++",
        )
        for name, flags in instruction_sets().items()
    ]


class BuildLibraries(build_ext):
    """Compile what can be compiled, and say in one sentence what could not."""

    def finalize_options(self):
        super().finalize_options()
        if self.parallel is None:
            self.parallel = os.cpu_count()

    def run(self):
        self.reasons = []
        if sys.platform == "win32":
            self.extensions = []
            self.reasons.append("there is no build for Windows yet")
        super().run()
        self.leave_reason()

    def build_extensions(self):
        compiler = self.compiler.compiler_cxx
        if compiler and shutil.which(compiler[0]) is None:
            found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
            if found is None:
                self.extensions = []
                self.reasons.append(
                    "no C++ compiler was found when mambakit was installed; "
                    "install g++ or clang++ and reinstall"
                )
                return
            self.compiler.set_executables(
                compiler_cxx=[found],
                compiler_so_cxx=[found],
                linker_so_cxx=[found, "-shared"],
            )
        super().build_extensions()
        # Setuptools copies every extension that it was given into the source tree of an
        # editable install: one that failed has nothing to copy.
        self.extensions = [
            ext for ext in self.extensions if os.path.exists(self.get_ext_fullpath(ext.name))
        ]

    def build_extension(self, ext):
        # Each library's objects get their own folder: their sources are the same files.
        folder = os.path.join(self.build_temp, ext.name.rpartition(".")[2])
        target = self.get_ext_fullpath(ext.name)
        try:
            objects = self.compiler.compile(
                ext.sources,
                output_dir=folder,
                include_dirs=[OPS],
                extra_postargs=ext.extra_compile_args,
                depends=ext.depends,
            )
            temporary = f"{target}.tmp{os.getpid()}"
            self.compiler.link_shared_object(objects, temporary, target_lang="c++")
            os.replace(temporary, target)
        except (CompileError, ExecError, LinkError, PlatformError) as error:
            # One of an earlier build would be of other sources, here as in the source tree.
            Path(target).unlink(missing_ok=True)
            if self.editable_mode:
                Path("src", self.get_ext_filename(ext.name)).unlink(missing_ok=True)
            self.reasons.append(
                f"{ext.name.rpartition('.')[2]} failed to compile when mambakit was installed "
                f"({error})"
            )

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + ".so"

    def copy_file(self, infile, outfile, *args, **kwargs):
        # A library may be in use: a process that has it loaded keeps the old file, whole.
        temporary = f"{outfile}.tmp{os.getpid()}"
        super().copy_file(infile, temporary, *args, **kwargs)
        os.replace(temporary, outfile)
        return outfile, 1

    def leave_reason(self):
        """Write why a library is missing beside where it would be, or remove an old reason."""
        folder = Path(OPS) if self.inplace else Path(self.build_lib, "mambakit", "ops")
        note = folder / MISSING
        note.unlink(missing_ok=True)
        if self.reasons:
            text = "; ".join(self.reasons)
            folder.mkdir(parents=True, exist_ok=True)
            note.write_text(text + "\n", encoding="utf-8")
            print(
                f"mambakit: installed without some of its fast CPU kernels: {text}",
                file=sys.stderr,
            )


class PlatformWheel(bdist_wheel):
    """Tag the wheel for this platform and for every Python 3: nothing in it knows the ABI."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


if sys.platform == "darwin":
    # A universal Python would compile for two machines at once, each refusing the other's
    # flags.
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")

setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
