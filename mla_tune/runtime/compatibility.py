"""Whether the builds that a table was measured with are those that an engine runs here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

from mla_tune.hardware.builds import (
    FLASH_MLA,
    SGL_KERNEL,
    UNKNOWN,
    VLLM,
    Build,
    distributions_of,
    flash_mla_package,
    installed_version,
    module_folder,
    module_of,
    package_of,
    requires,
)
from mla_tune.hardware.digests import known_digest
from mla_tune.policy.schema import Library, Policy, Table
from mla_tune.sites.provider import SGLANG, SGLANG_KERNEL


class BuildsHere:
    """The builds that ``engine`` runs on this machine, compared with those that a policy's tables name."""

    def __init__(self, engine: str, libraries: Iterable[Library] = (), *, installed: bool = True) -> None:
        """``engine``: ``own``, ``sglang`` or ``vllm``; ``libraries`` are the policy's, with the digests of their files.

        Without ``installed`` this machine is not asked: every build is taken to be there that the engine can run at all.
        """
        self._engine = engine
        self._installed = installed
        self._digests = {Build(one.name, one.version): one.sha256 for one in libraries if one.sha256}
        self._known: dict[str, str | None] = {}

    def fault(self, text: str) -> str | None:
        """Why the build ``text`` is not what runs here, in a few words; None if it is."""
        if text not in self._known:
            self._known[text] = self._fault(Build.parse(text))
        return self._known[text]

    def first_fault(self, builds: Iterable[str]) -> str | None:
        """The first :meth:`fault` of ``builds``; None where all of them are here."""
        return next((fault for build in builds if (fault := self.fault(build)) is not None), None)

    def _fault(self, build: Build) -> str | None:
        elsewhere = self._elsewhere(build)
        if elsewhere is not None:
            return elsewhere
        if build.version == UNKNOWN:
            return f"{build.name} was measured in an unknown version"
        if not self._installed:
            return None
        found = installed_version(build.name)
        if found is None:
            return f"{build.name} must be {build.version}: it is not installed"
        if found != build.version:
            return f"{build.name} must be {build.version}: got {found}"
        return self._files_fault(build)

    def _elsewhere(self, build: Build) -> str | None:
        """Where the engine has this library's kernels from, if not from the build's distribution."""
        module = module_of(build.name)
        if module is None or module == VLLM:
            return None
        if self._engine == VLLM:
            return f"{build.name} must be {build.version}: vLLM runs the {module} of its own wheel"
        if self._installed and module == FLASH_MLA and self._flash_mla not in (None, package_of(build.name)):
            there = f"{module} in {SGLANG_KERNEL}" if self._flash_mla == SGL_KERNEL else f"package {module}"
            said = f"{build.name} must be {build.version}: "
            if self._engine == SGLANG:
                return said + f"this SGLang runs the {there}, which `mla-tune ensure --engine {SGLANG}` measures"
            return said + f"what runs here is the {there}"
        return None

    @cached_property
    def _flash_mla(self) -> str | None:
        """The package whose FlashMLA the engine runs; None where nobody says.

        Before 0.5.23 SGLang required no distribution of FlashMLA: it was compiled into sglang-kernel.
        """
        if self._engine != SGLANG:
            return flash_mla_package()
        asked = {requires(SGLANG, name) for name in distributions_of(FLASH_MLA)}
        if True in asked:
            return FLASH_MLA
        return None if None in asked else SGL_KERNEL

    def _files_fault(self, build: Build) -> str | None:
        package = package_of(build.name)
        if package is None:
            return None
        folder = module_folder(package)
        if folder is None:
            return f"{build.name} must be {build.version}: its package {package} is not there"
        for other in distributions_of(package):
            if other != build.name and installed_version(other) is not None:
                return f"{build.name} must be {build.version}: {other} is installed over it"
        measured = self._digests.get(build)
        if measured is None:
            return None
        try:
            found = known_digest(folder)
        except OSError as error:
            return f"{build.name} must be {build.version}: its files cannot be read: {error.strerror}"
        if found != measured:
            return (
                f"{build.name} {build.version} must be the measured build {measured[:12]}: its files are {found[:12]}"
            )
        return None


def candidate_faults(table: Table, here: BuildsHere) -> dict[str, str]:
    """Candidates of ``table`` whose own builds are not here, each with the reason."""
    faults = ((entry.candidate, here.first_fault(entry.builds)) for entry in table.candidate_builds)
    return {candidate: fault for candidate, fault in faults if fault is not None}


def differences(policy: Policy, driver: str | None = None) -> Iterator[str]:
    """How the software here differs from that of the measurement, in what no table depends on: context for a reader.

    ``driver`` is the version of this machine's; None where nobody asked for it.
    """
    measured_with = policy.environment
    stated = {
        name: (installed_version(name), measured)
        for name, measured in (("torch", measured_with.torch), ("triton", measured_with.triton))
    }
    if driver:
        stated["driver"] = driver, measured_with.driver
    for name, (found, measured) in stated.items():
        if measured and found != measured:
            yield f"{name} {found or 'not installed'}, measured with {measured}"
