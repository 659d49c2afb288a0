"""Is a candidate's output right? Fresh inputs, a poisoned output, and the torch reference on a sample of its rows."""

from __future__ import annotations

from typing import Protocol

import torch

from mla_tune.bench.numerics import BF16_ATTENTION, mismatch, unwritten
from mla_tune.kernels import binding
from mla_tune.kernels.formats import PagedSelection
from mla_tune.kernels.indexer_metadata import shares
from mla_tune.kernels.inputs import AttentionInputs
from mla_tune.kernels.prepared import PreparedPath
from mla_tune.kernels.reference import metadata_reference, paged_attention_reference
from mla_tune.sites.site import Site

SAMPLED_ROWS = 32
"""Query tokens compared with the reference at each point; the rest of the output is checked for unwritten values."""


class Judge(Protocol):
    """Binds candidates to one set of inputs and judges what they give."""

    def prepare(self, name: str) -> PreparedPath:
        """The candidate bound to the inputs."""
        ...

    def poison(self) -> None:
        """Fill the memory that the next output will come from with NaN, so that an unwritten value shows."""
        ...

    def verdict(self, output: torch.Tensor) -> str | None:
        """Why ``output`` is wrong; None if it is right."""
        ...


class AttentionJudge:
    """Judges attention outputs (num_qo_tokens, h_q, 512) bf16."""

    def __init__(self, inputs: AttentionInputs, device: binding.Device, rows: int = SAMPLED_ROWS) -> None:
        self._inputs, self._device = inputs, device
        count = inputs.q.shape[0]
        picks = torch.linspace(0, count - 1, min(rows, count), device=inputs.q.device)
        self._rows = picks.round().long()
        self._reference: torch.Tensor | None = None

    def prepare(self, name: str) -> PreparedPath:
        """The candidate bound to the inputs."""
        return binding.prepare_attention(self._inputs, name, self._device)

    def poison(self) -> None:
        """Hand the allocator a NaN block of the output's size, which the kernel's own allocation then reuses."""
        num_tokens, h_q, _ = self._inputs.q.shape
        shape = (num_tokens, h_q, 512)
        del_me = torch.full(shape, float("nan"), dtype=torch.bfloat16, device=self._inputs.q.device)
        del del_me

    def verdict(self, output: torch.Tensor) -> str | None:
        """Why ``output`` is wrong; None if it is right."""
        if self._reference is None:
            self._reference = self._sampled_reference()
        return unwritten(output) or mismatch(output[self._rows], self._reference, BF16_ATTENTION)

    def _sampled_reference(self) -> torch.Tensor:
        inputs, rows = self._inputs, self._rows
        selections = [
            PagedSelection(part.cache, part.fmt, part.page_size, part.slot_ids[rows], part.lengths[rows])
            for part in inputs.selections()
        ]
        return paged_attention_reference(inputs.q[rows], selections, inputs.sm_scale, inputs.attn_sink)[0]


class IndexerJudge:
    """Judges schedule metadata (num_sms + 1, 2) int32: the SMs must get the shares of the reference.

    Which of them get the splits that are left over differs between the releases of DeepGEMM, and does not matter.
    """

    def __init__(self, site: Site, context_lens: torch.Tensor, device: binding.Device) -> None:
        self._site, self._context_lens, self._device = site, context_lens, device

    def prepare(self, name: str) -> PreparedPath:
        """The candidate bound to the context lengths."""
        return binding.prepare_indexer(self._context_lens, self._site, name, self._device)

    def poison(self) -> None:
        """Hand the allocator a block of -1 of the output's size."""
        shape = (self._device.sm_count + 1, 2)
        del_me = torch.full(shape, -1, dtype=torch.int32, device=self._context_lens.device)
        del del_me

    def verdict(self, output: torch.Tensor) -> str | None:
        """Why ``output`` is wrong; None if it is right."""
        context_lens, output = self._context_lens.cpu(), output.cpu()
        expected = metadata_reference(context_lens, self._device.sm_count)
        if output.shape != expected.shape:
            return f"shape {tuple(output.shape)} differs from the reference's {tuple(expected.shape)}"
        got, want = shares(context_lens, output), shares(context_lens, expected)
        if torch.equal(got, want):
            return None
        if int(got.min()) < 0:
            return "the schedule names rows or splits that do not exist, leaves out the first, or is out of order"
        wrong = int((got != want).sum())
        return (
            f"{wrong} of {len(want)} SMs get another share than the reference gives: "
            f"{int(got.min())} to {int(got.max())} splits instead of {int(want.min())} to {int(want.max())}"
        )
