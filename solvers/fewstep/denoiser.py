"""Conversion of a network's output to `denoiser(x, sigma) -> x0`, whatever the network predicts.

With x in variance-exploding coordinates (x_t = alpha x, sigma = sigma_t / alpha) every prediction gives
x0 = p x + q output. `coefficients` is the table of (p, q) and `to_x0` applies it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from . import _validation
from ._tracing import constants, placed
from ._validation import check_answer
from .errors import InputError
from .executor import Evaluate, Pair, evaluation_of, weighted
from .guidance import Guide, Guided
from .plan import Weight
from .problem import Denoiser
from .schedule import Schedule, check_schedule

Model = Callable[[Tensor, Tensor], Tensor]
Dtype = torch.dtype | None
Conversion = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# (sigma, alpha) -> (p, q) from x_t = alpha x0 + sigma_t eps and the meaning of the output:
# epsilon = eps; v = alpha eps - sigma_t x0; score = -eps / sigma_t; sample = x0; flow = eps - x0
AFFINE: dict[str, Conversion] = {
    "epsilon": lambda s, a: (torch.ones_like(s), -s),
    "v_prediction": lambda s, a: (1 / (1 + s * s), -s / (a * (1 + s * s))),
    "score": lambda s, a: (torch.ones_like(s), s * s * a),
    "sample": lambda s, a: (torch.zeros_like(s), torch.ones_like(s)),
    "flow": lambda s, a: (1 / (1 + s), -s / (1 + s)),
}


def coefficients(
    kind: str | Conversion, sigma: Tensor, alpha: Tensor, prediction: str = "data"
) -> tuple[Tensor, Tensor]:
    """(p, q) such that p x + q output is x0 ("data") or (x - x0) / sigma ("noise"); kind: of AFFINE, or a function."""
    p, q = (AFFINE[kind] if isinstance(kind, str) else kind)(sigma, alpha)
    return (p, q) if prediction == "data" else ((1 - p) / sigma, -q / sigma)


def to_x0(x: Tensor, output: Tensor, p: Weight, q: Weight) -> Tensor:
    """p x + q output in memory of its own, with (p, q) of `coefficients` as floats or as tensors that broadcast."""
    x0 = weighted([(q, output)] if isinstance(p, float) and p == 0 else [(p, x), (q, output)])
    return x0.clone() if x0 is output else x0  # networks may write each output to the same memory


class Prepared(ABC):
    """A denoiser that prepares the levels of a run before it."""

    @abstractmethod
    def on(self, levels: Tensor, like: Tensor, prediction: str, own: bool = True) -> Evaluate:
        """`(i, x, normals) -> x0 or noise` at the i-th of the levels (R,), see `on_levels`."""


@dataclass(frozen=True)
class Converted(Prepared):
    """A network as a denoiser. Made by `from_epsilon`, `from_v`, and so on."""

    model: Model  # (x_t, t) -> output, t of shape (batch,)
    schedule: Schedule | None  # gives alpha and the label of a level; None for networks called with (x, sigma) itself
    kind: str | Conversion  # what the output is, see `coefficients`
    # of labels: "nearest" or "down", as diffusers does on Karras and logSNR or on exponential grids (an error floor of
    # about 3e-4, and what embeddings by table need)
    rounding: str | None = None
    dtype: torch.dtype | None = None  # what the network computes in; x and the result stay in the trajectory's

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x0 from x (batch, *event); sigma: 0-d or (batch,)."""
        sigma = _validation.check_input(x, sigma)
        shape = (-1,) + (1,) * (x.dim() - 1) if sigma.dim() else ()
        alpha, label, p, q = self._numbers(sigma.double(), "data")
        alpha, p, q = (v.to(x.dtype).reshape(shape) for v in (alpha, p, q))
        guide = (self.model.scale_at(sigma.double(), x), p, q) if isinstance(self.model, Guided) else None
        return self._apply(x, alpha, label.to(x.dtype).expand(len(x)), p, q, guide=guide)[0]

    def on(self, levels: Tensor, like: Tensor, prediction: str, own: bool = True) -> Evaluate:
        rows = self._rows(levels, like, prediction)

        def evaluate(i: int, x: Tensor, normals: Any = ()) -> Tensor:
            return self._apply(x, *rows[i])[0]

        return evaluate

    def x0s(self, levels: Tensor, like: Tensor) -> Callable[[int, Tensor], tuple[Tensor, Tensor | None]]:
        """The guided and the unconditional x0 of a guided network, the second None outside its intervals."""
        rows = self._rows(levels, like, "data")
        return lambda i, x: self._apply(x, *rows[i], both=True)

    def _rows(self, levels: Tensor, like: Tensor, prediction: str) -> list[tuple[Any, ...]]:
        """The arguments of `_apply` after x at each level."""
        numbers = self._numbers(levels.double().cpu(), prediction)
        for number in numbers:
            _validation.check_no_graph("schedule", number)
        alpha, label, p, q = numbers
        labels = placed(label, like.device, like.dtype).unsqueeze(1).expand(-1, len(like)).unbind()
        guides: list[Guide | None] = [None] * len(levels)
        if isinstance(self.model, Guided):
            data = (constants(v) for v in self._numbers(levels.double().cpu(), "data")[2:])
            guides = list(zip(self.model.scales(levels, like), *data, strict=True))
        where = [partial(_place, i, s) for i, s in enumerate(constants(levels))]
        return list(zip(constants(alpha), labels, constants(p), constants(q), where, guides))

    def _numbers(self, sigma: Tensor, prediction: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.schedule is None:
            alpha, label = torch.ones_like(sigma), sigma
        else:
            alpha, label = self.schedule.alpha(sigma), self.schedule.label(sigma)
        if self.rounding is not None:
            # tolerate the float32 rounding of integer labels before rounding down
            label = label.round() if self.rounding == "nearest" else torch.floor(label + 1e-3)
        return alpha, label, *coefficients(self.kind, sigma, alpha, prediction)

    def _apply(
        self, x: Tensor, alpha: Weight, label: Tensor, p: Weight, q: Weight, where: str | Callable[[], str] = "",
        guide: Guide | None = None, *, both: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """p x + q output, and of a guided network the same of the unconditional output, if evaluated."""
        x_t = x if isinstance(alpha, float) and alpha == 1 else x * alpha
        x_t = x_t if self.dtype is None else x_t.to(self.dtype)

        def checked(out: Tensor) -> Tensor:
            if self.dtype is not None and torch.is_tensor(out):
                out = out.to(x.dtype)
            hint = "" if torch.is_tensor(out) else "Wrap a network of diffusers as lambda x, t: net(x, t).sample."
            return check_answer("model", out, x, where, hint=hint)

        if not isinstance(self.model, Guided) or guide is None:
            return to_x0(x, checked(self.model(x_t, label)), p, q), None
        u, c = (v if v is None else checked(v) for v in self.model.halves(x_t, label, guide[0], both))
        out = self.model.combined(u, c, x, *guide)
        return to_x0(x, out, p, q), to_x0(x, u, p, q) if both and u is not None else None


def from_epsilon(model: Model, schedule: Schedule, *, rounding: str | None = None, dtype: Dtype = None) -> Converted:
    """A denoiser from a network of the noise, `model(x_t, t) -> eps` with t of shape (batch,).

    x_t = alpha_t x0 + sigma_t eps, hence x0 = x - sigma eps in variance-exploding coordinates.

    Args:
        rounding: round t to integer labels: "nearest" or "down".
        dtype: what the network computes in; by default its parameters' dtype, where it has any.
    """
    return _convert(model, schedule, "epsilon", rounding, dtype)


def from_v(model: Model, schedule: Schedule, *, rounding: str | None = None, dtype: Dtype = None) -> Converted:
    """A denoiser from `model(x_t, t) -> v = alpha_t eps - sigma_t x0` (arXiv 2202.00512), as in `from_epsilon`."""
    return _convert(model, schedule, "v_prediction", rounding, dtype)


def from_score(model: Model, schedule: Schedule, *, rounding: str | None = None, dtype: Dtype = None) -> Converted:
    """A denoiser from `model(x_t, t) -> grad log p_t(x_t) = -eps / sigma_t`. Options as in `from_epsilon`."""
    return _convert(model, schedule, "score", rounding, dtype)


def from_sample(model: Model, schedule: Schedule, *, rounding: str | None = None, dtype: Dtype = None) -> Converted:
    """A denoiser from a network of the data, `model(x_t, t) -> x0`. Options as in `from_epsilon`."""
    return _convert(model, schedule, "sample", rounding, dtype)


def from_flow(model: Model, schedule: Schedule, *, rounding: str | None = None, dtype: Dtype = None) -> Converted:
    """A denoiser from the velocity of x_t = (1 - t) x0 + t eps, `model(x_t, t) -> eps - x0`, as in `from_epsilon`."""
    return _convert(model, schedule, "flow", rounding, dtype)


def from_edm(
    net: Callable[..., Tensor], *, class_labels: Tensor | None = None, force_fp32: bool = False, dtype: Dtype = None
) -> Converted:
    """A denoiser from EDM's preconditioned network `net(x, sigma[, class_labels]) -> x0`, sigma (batch,).

    Its schedule is `EDM(max(0.002, net.sigma_min), min(80.0, net.sigma_max))`, as in EDM's own sampler. Networks with a
    table of levels round sigma themselves; to put the grid on their levels, sample with
    `sigmas=torch.cat([net.round_sigma(grid[:-1]), grid[-1:]])`, grid from `sigma_grid`.

    Args:
        class_labels: (batch, label_dim), or one row (label_dim,) for all; passed as the third argument.
        force_fp32: passed to the network where it is True.
        dtype: what the network computes in; x0 is returned in x's dtype.

    Raises:
        InputError: labels that are not rows; when called, another number of rows than samples.
    """
    _validation.check_callable("net", net, "a network called as net(x, sigma)")
    keywords: dict[str, bool] = {"force_fp32": True} if _validation.check_flag("force_fp32", force_fp32) else {}
    labels = None if class_labels is None else _label_rows(class_labels, getattr(net, "label_dim", None))

    @lru_cache(maxsize=1)  # not moved in each evaluation
    def rows_on(device: torch.device) -> Tensor | None:
        return None if labels is None else labels.to(device)

    if isinstance(net, Guided) and labels is None and not keywords:
        return _convert(net, None, "sample", None, dtype)

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        if labels is not None and len(labels) not in (1, len(x)):
            raise InputError(
                f"class_labels: got {len(labels)} rows for a batch of {len(x)}; expected a row for each sample, or one "
                "for all. Convert the network anew with the labels of this batch."
            )
        moved = rows_on(x.device)
        rows = () if moved is None else (moved.expand(len(x), -1),)
        return net(x, sigma, *rows, **keywords)

    return _convert(model, None, "sample", None, _half(net) if dtype is None else dtype)


def _label_rows(labels: Any, width: int | None) -> Tensor:
    """Return (1 or batch, label_dim) rows; rejects class numbers, which EDM would read as one long row."""
    given = torch.is_tensor(labels) and labels.layout == torch.strided and not labels.is_meta
    given = given and labels.dim() in (1, 2) and len(labels) > 0
    if given and width in (None, 0, labels.shape[-1]):
        rows: Tensor = labels.reshape(-1, labels.shape[-1])
        if rows.is_floating_point() or not bool(((rows > 1) | (rows < 0)).any()):
            return rows
    got = f"shape {tuple(labels.shape)}" if torch.is_tensor(labels) else type(labels).__name__
    raise InputError(
        f"class_labels: got {got}, expected rows (batch, label_dim) or (label_dim,) with label_dim = "
        f"{width or 'the number of classes'}. Use torch.nn.functional.one_hot(numbers, label_dim)."
    )


def _convert(model: Model, schedule: Schedule | None, kind: str, rounding: str | None, dtype: Dtype) -> Converted:
    if rounding is not None:
        _validation.check_choice("rounding", rounding, ("nearest", "down"))
    _validation.check_callable("model", model, "a network called as model(x_t, t)")
    _validation.check_dtype(dtype)
    check_schedule(schedule, optional=True)
    network = model.model if isinstance(model, Guided) else model
    return Converted(model, schedule, kind, rounding, _half(network) if dtype is None else dtype)


def _half(model: Any) -> torch.dtype | None:
    """The half precision of a network's parameters, None where they have another or several dtypes."""
    if not isinstance(model, torch.nn.Module):
        return None
    kinds = {p.dtype for p in model.parameters()} & {torch.float16, torch.bfloat16}
    return kinds.pop() if len(kinds) == 1 else None


@dataclass(frozen=True)
class PostprocessedDenoiser(Prepared):
    """A denoiser with post-processing of x0, such as clipping or thresholding."""

    denoiser: Denoiser
    postprocess: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = _validation.check_input(x, sigma)
        return self.postprocess(check_answer("denoiser", self.denoiser(x, sigma), x))

    def on(self, levels: Tensor, like: Tensor, prediction: str, own: bool = True) -> Evaluate:
        inner = on_levels(self.denoiser, levels, like, "data", own=False)
        return evaluations(lambda i, x: self.postprocess(inner(i, x, ())), levels, prediction, own)


def clip(denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> PostprocessedDenoiser:
    """x0 clamped to [low, high] (diffusers' clip_sample)."""
    _validation.check_callable("denoiser", denoiser, "a function (x, sigma) -> x0")
    if not _validation.check_float("low", low) < _validation.check_float("high", high):
        raise InputError(f"low, high: got {low!r} and {high!r}, expected low < high.")
    return PostprocessedDenoiser(denoiser, lambda x0: x0.clamp(low, high))


def dynamic_thresholding(denoiser: Denoiser, quantile: float = 0.995, most: float = 1.0) -> PostprocessedDenoiser:
    """x0 clamped to [-s, s] and divided by s, the quantile of |x0| per sample, itself within [1, most].

    For data in [-1, 1] in pixel space under strong guidance (arXiv 2205.11487, Section 2.3).
    """
    _validation.check_callable("denoiser", denoiser, "a function (x, sigma) -> x0")
    quantile = _validation.check_float("quantile", quantile, 0, 1, "a number in [0, 1]")
    most = _validation.check_float("most", most, 0, expected="a number of at least 0")
    return PostprocessedDenoiser(denoiser, partial(threshold, quantile=quantile, most=most))


def threshold(x0: Tensor, quantile: float, most: float) -> Tensor:
    """One estimate (batch, *event) of `dynamic_thresholding`."""
    if not x0.numel():
        return x0
    size = x0.abs().reshape(len(x0), -1).to(torch.promote_types(x0.dtype, torch.float32))
    # torch.quantile takes 2^24 numbers at most
    parts = torch.split(size, max(1, 2**24 // size.shape[1]))
    s = torch.cat([torch.quantile(part, quantile, dim=1) for part in parts]).to(x0.dtype).clamp(1, max(most, 1.0))
    s = s.reshape(-1, *[1] * (x0.dim() - 1))
    return x0.clamp(-s, s) / s


def pairs_on_levels(
    denoiser: Denoiser, levels: Tensor, like: Tensor, prediction: str
) -> Callable[[int, Tensor], Tensor | Pair]:
    """`on_levels` of a guided network, with the unconditional evaluation where there is guidance (CFG++)."""
    edits: list[Callable[[Tensor], Tensor]] = []
    while isinstance(denoiser, PostprocessedDenoiser):
        edits.insert(0, denoiser.postprocess)
        denoiser = denoiser.denoiser
    if not isinstance(denoiser, Converted) or not isinstance(denoiser.model, Guided):
        raise InputError(
            "cfg_pp: got True and a model without guidance; expected the conversion of a network of "
            "classifier_free_guidance, for instance from_epsilon(classifier_free_guidance(...), schedule)."
        )
    inner, sigmas = denoiser.x0s(levels, like), constants(levels)

    def evaluate(i: int, x: Tensor) -> Tensor | Pair:
        D, other = inner(i, x)
        for edit in edits:
            D = edit(D)
        guided = evaluation_of(prediction, x, sigmas[i], D)
        return guided if other is None else Pair(guided, evaluation_of(prediction, x, sigmas[i], other))

    return evaluate


def on_levels(denoiser: Denoiser, levels: Tensor, like: Tensor, prediction: str, own: bool = True) -> Evaluate:
    """`(i, x, normals) -> x0 or noise` at the i-th of the levels (R,), for any denoiser, checked.

    With `own` an evaluation has memory of its own, without it that of the model's output.
    """
    if isinstance(denoiser, Prepared):
        return denoiser.on(levels, like, prediction, own)
    at = placed(levels, like.device, like.dtype).unbind()
    return evaluations(lambda i, x: denoiser(x, at[i]), levels, prediction, own)


def evaluations(x0: Callable[[int, Tensor], Tensor], levels: Tensor, prediction: str, own: bool) -> Evaluate:
    """The checked x0, or the noise (x - x0) / sigma, with `own` in memory that no later call of the model writes to."""
    sigmas = constants(levels)

    def evaluate(i: int, x: Tensor, normals: Any = ()) -> Tensor:
        D = check_answer("denoiser", x0(i, x), x, lambda: _place(i, sigmas[i]))
        if prediction != "data":
            return evaluation_of("noise", x, sigmas[i], D)
        return D.clone() if own else D

    return evaluate


def evaluation_names(levels: Tensor) -> list[str]:
    """The evaluations at levels (R,), for messages."""
    return [_place(i, s) for i, s in enumerate(constants(levels))]


def _place(i: int, sigma: float) -> str:
    return f" at evaluation {i} (sigma = {sigma:.4g})"


def check_prediction(denoiser: Denoiser, schedule: Schedule, like: Tensor, seed: int = 0) -> None:
    """Reject a network that was converted by the wrong `from_...`, with one evaluation on pure noise.

    At the largest sigma x = sigma n carries almost no information on x0, which must hardly depend on n. The slope of x0
    over n is judged in units of the network's output, since x0 = x - sigma eps multiplies an error of eps by sigma. The
    test cannot separate predictions that agree there (v and sample up to sign, epsilon and flow); an untrained network
    fails it.

    Args:
        denoiser: made by `from_epsilon` and related functions, perhaps clipped; the x0 of another one is its output. It
            is called with x (batch, *event) and sigma, a 0-d tensor.
        schedule: the process that the network was trained on; its `sigma_max` is where it is evaluated.
        like: (batch, *event) a tensor like the samples; only shape, dtype and device matter, and more elements are more
            reliable.
        seed: of the noise.

    Raises:
        InputError: the output differs by more than 1/4 of the noise from one whose x0 does not depend on the noise.
    """
    _validation.check_callable("denoiser", denoiser, "a function (x, sigma) -> x0")
    check_schedule(schedule)
    _validation.check_state("like", like)
    own = torch.Generator(like.device).manual_seed(_validation.check_seed(seed))
    n = torch.randn(like.shape, generator=own, dtype=like.dtype, device=like.device)
    sigma = torch.tensor(schedule.sigma_max, dtype=torch.float64)
    while isinstance(denoiser, PostprocessedDenoiser):
        denoiser = denoiser.denoiser
    x0 = check_answer("denoiser", denoiser(n * sigma.to(n), sigma.to(n)), n)
    slope = float((x0 * n).sum() / n.square().sum())
    unit = float(denoiser._numbers(sigma, "data")[3].abs()) if isinstance(denoiser, Converted) else 1.0
    if not abs(slope) <= 0.25 * unit:
        kind = getattr(denoiser, "kind", "x0")
        raise InputError(
            f"denoiser: got a {kind!r} conversion whose output is off by {slope / unit:.3g} of the noise at sigma = "
            f"{float(sigma):.4g}, where x0 must not depend on it. Convert with another of from_epsilon, from_v, "
            "from_score, from_sample, from_flow, and check the time that the network is given."
        )
