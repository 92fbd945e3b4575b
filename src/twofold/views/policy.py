"""A policy declares what the encoder shall not care about, and draws views that differ in just that."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from twofold import runtime
from twofold.errors import DataError, UsageError, unknown
from twofold.views import apply, files
from twofold.views.render import CHANNELS, Parameters, one_thread, render

TRIES = 10  # boxes drawn a view, of which the first that fits is taken, as in torchvision
# The random numbers of a view, always all of them: switching one operation off leaves the draws of the others.
COLUMNS = {
    **dict.fromkeys(("areas", "aspects"), TRIES),
    **dict.fromkeys(("gain", "offset", "channel_drop"), CHANNELS),
    **dict.fromkeys(("top", "left", "flip", "vflip", "turned", "turns", "rotation", "shear", "blur", "sigma"), 1),
    **dict.fromkeys(("jitter", "brightness", "contrast", "saturation", "hue", "gray", "solarize", "posterize"), 1),
    **dict.fromkeys(("noise", "shot", "seed", "jpeg", "quality"), 1),
    **dict.fromkeys(("cutout", "hole_area", "hole_aspect", "hole_top", "hole_left"), 1),
}


class Operation(NamedTuple):
    """The fields of a policy that make an operation: how often it happens, and how strong it then is."""

    chance: str | None  # its probability: of this operation's name, or shared with others; None: it always happens
    weakest: Mapping[str, Any] = {}  # the other fields, where they change nothing or next to nothing
    strongest: Mapping[str, Any] = {}  # the same, as strong as is of any use


OPERATIONS: dict[str, Operation] = {
    "crop": Operation(None, {"area": (1.0, 1.0), "aspect": (1.0, 1.0)}, {"area": (0.08, 1.0), "aspect": (0.75, 4 / 3)}),
    "flip": Operation("flip"),
    "vflip": Operation("vflip"),
    "turns": Operation("turns"),
    "rotation": Operation(None, {"rotation": 0.0}, {"rotation": 180.0}),
    "shear": Operation(None, {"shear": 0.0}, {"shear": 30.0}),
    "blur": Operation("blur", {"blur_sigma": (0.1, 0.1)}, {"blur_sigma": (0.1, 2.0)}),
    "brightness": Operation("jitter", {"brightness": 0.0}, {"brightness": 1.0}),
    "contrast": Operation("jitter", {"contrast": 0.0}, {"contrast": 1.0}),
    "saturation": Operation("jitter", {"saturation": 0.0}, {"saturation": 1.0}),
    "hue": Operation("jitter", {"hue": 0.0}, {"hue": 0.5}),
    "gray": Operation("gray"),
    "gain": Operation(None, {"gain": 0.0}, {"gain": 1.0}),
    "offset": Operation(None, {"offset": 0.0}, {"offset": 0.5}),
    "channel_drop": Operation("channel_drop"),
    "solarize": Operation("solarize"),
    "posterize": Operation("posterize", {"posterize_bits": 8}, {"posterize_bits": 1}),
    "noise": Operation(None, {"noise": (0.0, 0.0)}, {"noise": (0.0, 0.2)}),
    "poisson": Operation(None, {"poisson": (0.0, 0.0)}, {"poisson": (0.0, 0.2)}),
    "jpeg": Operation("jpeg", {"jpeg_quality": (95, 95)}, {"jpeg_quality": (5, 95)}),
    "cutout": Operation("cutout", {"cutout_area": (0.01, 0.01)}, {"cutout_area": (0.01, 0.5)}),
}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Random views of a batch of pictures; the defaults are SimCLR's for ImageNet (arXiv 2002.05709, appendix A).

    Derive a variant with `dataclasses.replace(SIMCLR, blur=0.0)`, or with `only`, `without` and `scaled`, which know
    operations by name. They happen in the order of `OPERATIONS`; crop, flips and turns are one resampling, and all that
    is linear in colour is one map. Pictures of other than three channels need saturation, hue and gray at 0: they are
    refused otherwise, never quietly left alone. `apply.color_map` says how colour differs from torchvision's.
    """

    size: int = 224  # pixels a side of a view
    area: tuple[float, float] = (0.08, 1.0)  # of the crop, as a share of the picture's; uniform
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of the crop; log-uniform
    flip: float = 0.5  # probability of mirroring left to right
    vflip: float = 0.0  # probability of mirroring top to bottom
    turns: float = 0.0  # probability of one to three quarter turns
    rotation: float = 0.0  # degrees, uniform in ± this; beyond the edge lies the picture's mirror image
    shear: float = 0.0  # degrees to the right, uniform in ± this
    jitter: float = 0.8  # probability of the four that follow, together
    brightness: float = 0.8  # factors are uniform in [max(0, 1 − strength), 1 + strength]
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2  # turn of the colour circle, uniform in ± this; at most ½
    gray: float = 0.2  # probability of grayscale
    blur: float = 0.5  # probability of a Gaussian blur
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # its σ in pixels of the view; its window is a tenth of the view
    gain: float = 0.0  # of each channel alone: a factor uniform in [max(0, 1 − this), 1 + this]
    offset: float = 0.0  # added to each channel alone, uniform in ± this
    channel_drop: float = 0.0  # probability of each channel to become 0; one is always kept
    solarize: float = 0.0  # probability of inverting all values from ½ up
    posterize: float = 0.0  # probability of rounding down to few values
    posterize_bits: int = 4  # 2 to the power of this many
    noise: tuple[float, float] = (0.0, 0.0)  # σ of additive Gaussian noise; uniform
    poisson: tuple[float, float] = (0.0, 0.0)  # σ of shot noise at full brightness: its variance follows the value
    jpeg: float = 0.0  # probability of compression by JPEG, blocks and all
    jpeg_quality: tuple[int, int] = (30, 90)  # 1 to 100
    cutout: float = 0.0  # probability of a hole filled with the view's mean colour
    cutout_area: tuple[float, float] = (0.02, 0.2)  # of the hole, as a share of the view; its aspect is ½ to 2
    mean: tuple[float, ...] = ()  # with std: views leave as (view − mean) / std, else in [0, 1]
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in sorted({part.chance for part in OPERATIONS.values() if part.chance}):
            _check(0 <= getattr(self, name) <= 1, self, name, "a probability in [0, 1]")
        for name in ("brightness", "contrast", "saturation", "gain"):
            _check(0 <= getattr(self, name) < math.inf, self, name, "a strength of at least 0")
        for name, most in (("hue", 0.5), ("offset", 1), ("rotation", 180), ("shear", 60)):
            _check(0 <= getattr(self, name) <= most, self, name, f"a strength in [0, {most:g}]")
        _check(self.size >= 1 and int(self.size) == self.size, self, "size", "a whole number of pixels, at least 1")
        _check(self.blur == 0 or self.size >= 2, self, "size", "at least 2 pixels where views are blurred")
        _check(self.posterize_bits in range(1, 17), self, "posterize_bits", "a whole number from 1 to 16")
        for name, most in (("area", 1), ("aspect", math.inf), ("blur_sigma", math.inf), ("cutout_area", 1)):
            self._check_range(name, most, positive=True)
        for name in ("noise", "poisson"):
            self._check_range(name, 1)
        self._check_range("jpeg_quality", 100, positive=True)
        _check(all(int(q) == q for q in self.jpeg_quality), self, "jpeg_quality", "two whole numbers from 1 to 100")
        _check(len(self.mean) == len(self.std), self, "mean", "as long as std")
        _check(all(s > 0 for s in self.std), self, "std", "positive in every channel")

    def _check_range(self, name: str, most: float, *, positive: bool = False) -> None:
        value = getattr(self, name)
        expected = (
            f"(low, high) with 0 {'<' if positive else '≤'} low ≤ high {'<' if most == math.inf else '≤'} {most:g}"
        )
        _check(isinstance(value, tuple) and len(value) == 2, self, name, expected)
        low, high = value
        _check((low > 0 if positive else low >= 0) and low <= high <= most and high < math.inf, self, name, expected)

    def __call__(
        self, images: Shaped[Tensor, "b c h w"], draw: torch.Generator
    ) -> Float[Tensor, "b c {self.size} {self.size}"]:
        """One view of each picture (uint8, uint16 or float in [0, 1]), float32 on the pictures' device.

        The same state of `draw` gives the same views; with several processes, each passes its rows of the batch.
        """
        b, _, h, w = _shape(images)
        with runtime.part("views"):
            return self.render(images, self.parameters(b, h, w, draw))

    def parameters(self, count: int, height: int, width: int, draw: torch.Generator) -> Parameters:
        """What is random about `count` views of pictures of height × width."""
        self._check_area(height, width)
        with one_thread():
            table = runtime.uniform(count, sum(COLUMNS.values()), draw).cpu().double()
            return self._drawn(height, width, dict(zip(COLUMNS, table.split([*COLUMNS.values()], dim=1), strict=True)))

    def _drawn(self, height: int, width: int, noise: dict[str, Tensor]) -> Parameters:
        """The policy's distributions, from the uniform numbers of each column."""
        u = {name: column[:, 0] for name, column in noise.items() if column.shape[1] == 1}
        jittered = u["jitter"] < self.jitter
        factors = {
            name: torch.where(jittered, _between(*_about(1, getattr(self, name)), u[name]), 1.0)
            for name in ("brightness", "contrast", "saturation")
        }
        boxes = self._boxes(height, width, noise["areas"], noise["aspects"], u["top"], u["left"])
        hole_area, hole_aspect = _between(*self.cutout_area, u["hole_area"]), 2 ** _between(-0.5, 0.5, u["hole_aspect"])
        sides = torch.stack((hole_area.sqrt() / hole_aspect, hole_area.sqrt() * hole_aspect), 1).clamp(max=1)
        corner = torch.stack((u["hole_top"], u["hole_left"]), 1) * (1 - sides)
        low, high = self.jpeg_quality
        return Parameters(
            boxes=boxes,
            kept=boxes[:, 2] * boxes[:, 3] / (height * width),
            turns=torch.where(u["turned"] < self.turns, 1 + (3 * u["turns"]).int(), 0),
            horizontal=u["flip"] < self.flip,
            vertical=u["vflip"] < self.vflip,
            rotation=_between(-self.rotation, self.rotation, u["rotation"]),
            shear=_between(-self.shear, self.shear, u["shear"]),
            sigma=torch.where(u["blur"] < self.blur, _between(*self.blur_sigma, u["sigma"]), 0.0),
            **factors,
            hue=torch.where(jittered, _between(-self.hue, self.hue, u["hue"]), 0.0),
            gray=u["gray"] < self.gray,
            gain=_between(*_about(1, self.gain), noise["gain"]),
            offset=_between(-self.offset, self.offset, noise["offset"]),
            dropped=noise["channel_drop"] < self.channel_drop,
            solarize=u["solarize"] < self.solarize,
            bits=torch.where(u["posterize"] < self.posterize, self.posterize_bits, 0),
            noise=_between(*self.noise, u["noise"]),
            shot=_between(*self.poisson, u["shot"]),
            seed=(2**31 * u["seed"]).long(),
            quality=torch.where(u["jpeg"] < self.jpeg, (low + (high - low + 1) * u["quality"]).long(), 0),
            hole=torch.where((u["cutout"] < self.cutout)[:, None], torch.cat((corner, sides), 1), 0.0),
        )

    def _boxes(
        self, height: int, width: int, areas: Tensor, aspects: Tensor, top: Tensor, left: Tensor
    ) -> Int[Tensor, "b 4"]:
        """The first of the drawn boxes that fits; where none does, the largest central one of an allowed aspect."""
        low, high = self.aspect
        area = height * width * _between(*self.area, areas)
        aspect = _between(math.log(low), math.log(high), aspects).exp()
        w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
        first = fits.int().argmax(1, keepdim=True)
        w, h = (side.gather(1, first)[:, 0] for side in (w, h))
        top, left = (top * (height - h + 1)).floor(), (left * (width - w + 1)).floor()
        drawn = torch.stack((top, left, h, w), 1).long()

        h0, w0 = max(1, min(height, round(width / low))), max(1, min(width, round(height * high)))
        central = torch.tensor(((height - h0) // 2, (width - w0) // 2, h0, w0), device=drawn.device)
        return torch.where(fits.any(1, keepdim=True), drawn, central)

    def render(
        self, images: Shaped[Tensor, "b c h w"], drawn: Parameters
    ) -> Float[Tensor, "b c {self.size} {self.size}"]:
        """The views that `drawn` describes: a function of its arguments alone."""
        self._check_channels(_shape(images)[1])
        _check_values(images)
        views = render(images, drawn, size=self.size, radius=max(1, self.size // 20))
        return apply.normalise(views, self.mean, self.std) if self.mean else views

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations that are on, in the order of `OPERATIONS`."""
        return tuple(name for name in OPERATIONS if self._on(name))

    def _on(self, name: str) -> bool:
        chance, weakest, _ = OPERATIONS[name]
        happens = chance is None or getattr(self, chance) > 0
        return happens and (chance == name or any(getattr(self, field) != weakest[field] for field in weakest))

    def only(self, *names: str) -> Self:
        """This policy with all operations but these off; with none, the largest central square of each picture."""
        _known(names)
        return self.without(*(name for name in OPERATIONS if name not in names))

    def without(self, *names: str) -> Self:
        """This policy with these operations off."""
        _known(names)
        changes: dict[str, Any] = {}
        for name in names:
            chance, weakest, _ = OPERATIONS[name]
            changes |= {chance: 0.0} if chance == name else weakest
        policy = replace(self, **changes)
        # A probability that several operations share goes with the last of them.
        needed = {OPERATIONS[name].chance for name in policy.operations}
        shared = {chance for name in names if (chance := OPERATIONS[name].chance) not in (None, name)}
        idle: dict[str, Any] = dict.fromkeys(shared - needed, 0.0)
        return replace(policy, **idle)

    def scaled(self, name: str, strength: float) -> Self:
        """This policy with one operation at a strength from 0 (off) to 1 (as strong as is of any use).

        An operation with a probability alone, as a flip, has it set. One with a strength has that set, and keeps its
        probability; where that is 0, it becomes 1.
        """
        _known([name])
        if not 0 <= strength <= 1:
            raise UsageError(f"The strength of {name} goes from 0 (off) to 1 (full); got {strength}.")
        if strength == 0:
            return self.without(name)
        chance, weakest, strongest = OPERATIONS[name]
        changes = {field: _mixed(weakest[field], strongest[field], strength) for field in weakest}
        if chance is not None:
            changes[chance] = (getattr(self, chance) or 1.0) if weakest else strength
        return replace(self, **changes)

    def diff(self, other: "Policy") -> str:
        """What `other` has otherwise, field by field: "area 0.08–1 → 0.2–1, hue 0.2 → 0.1"."""
        pairs = ((field.name, getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return ", ".join(f"{name} {_short(mine)} → {_short(theirs)}" for name, mine, theirs in pairs if mine != theirs)

    def __str__(self) -> str:
        """The fields of what is on: "size 224, area 0.08–1, aspect 0.75–1.33, flip 0.5, …"."""
        parts = (OPERATIONS[name] for name in self.operations)
        on = {field: None for part in parts for field in (part.chance, *part.weakest) if field}
        return ", ".join(f"{field} {_short(getattr(self, field))}" for field in ("size", *on))

    def to_dict(self) -> dict[str, Any]:
        """Every field, as JSON has them: numbers and lists of numbers."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The policy with these fields; those not named are SimCLR's, as always."""
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                raise unknown("field of a policy", name, names)
        pairs: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        try:
            return cls(**pairs)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"A policy's fields are numbers and pairs of numbers: {error}. Got {dict(values)}."
            ) from None

    def save(self, path: Path | str) -> None:
        """Write the policy as TOML or JSON, by the suffix of `path`."""
        files.write([self.to_dict()], Path(path))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """The policy that `save` wrote, or someone by hand: what is not named there is SimCLR's."""
        first, *others = files.read(Path(path))
        if others:
            raise DataError(f"{path} holds {1 + len(others)} policies, one a view. `views.policies` reads such files.")
        return cls.from_dict(first)

    def describe(self, drawn: Parameters, i: int) -> str:
        """What was drawn for view i: "crop 31 %, flip, hue +0.12, blur σ 1.3"."""
        one = {name: part[i].tolist() for name, part in drawn._asdict().items()}
        words = {
            "crop": f"crop {100 * one['kept']:.0f} %",
            "flip": "flip" if one["horizontal"] else "",
            "vflip": "vflip" if one["vertical"] else "",
            "turns": f"turn {90 * one['turns']}°" if one["turns"] else "",
            "rotation": f"rotation {one['rotation']:+.0f}°",
            "shear": f"shear {one['shear']:+.0f}°",
            "blur": f"blur σ {one['sigma']:.1f}" if one["sigma"] else "",
            **{name: f"{name} ×{one[name]:.2f}" for name in ("brightness", "contrast", "saturation") if one[name] != 1},
            "hue": f"hue {one['hue']:+.2f}" if one["hue"] else "",
            "gray": "gray" if one["gray"] else "",
            "gain": "gain",
            "offset": "offset",
            "channel_drop": "channel_drop" if any(one["dropped"]) else "",
            "solarize": "solarize" if one["solarize"] else "",
            "posterize": f"posterize {one['bits']} bits" if one["bits"] else "",
            "noise": f"noise {one['noise']:.2f}",
            "poisson": f"poisson {one['shot']:.2f}",
            "jpeg": f"jpeg {one['quality']}" if one["quality"] else "",
            "cutout": f"cutout {100 * one['hole'][2] * one['hole'][3]:.0f} %" if any(one["hole"]) else "",
        }
        return ", ".join(words[name] for name in self.operations if words.get(name))

    def check(self, channels: int, height: int, width: int) -> None:
        """Refuse pictures that this policy cannot make views of: before a training begins, not at its first batch."""
        self._check_channels(channels)
        self._check_area(height, width)

    def _check_area(self, height: int, width: int) -> None:
        if self.area[1] * height * width < 1:
            raise UsageError(
                f"area={self.area} of a picture of {height}×{width} pixels is less than one pixel. Raise area."
            )

    def _check_channels(self, channels: int) -> None:
        needed = [name for name in ("saturation", "hue", "gray") if name in self.operations]
        if channels != 3 and needed:
            raise UsageError(
                f"{', '.join(needed)} need pictures of 3 channels; these have {channels}. "
                f"Switch them off: replace(policy, {', '.join(f'{name}=0.0' for name in needed)}), "
                f"or {' '.join(f'--policy.{name} 0' for name in needed)}."
            )
        single = [name for name in ("gain", "offset", "channel_drop") if name in self.operations]
        if channels > CHANNELS and single:
            raise UsageError(
                f"{', '.join(single)} draw for each channel, {CHANNELS} at most; these pictures have {channels}. "
                f"Switch them off: policy.without({', '.join(map(repr, single))})."
            )
        if len(self.mean) not in (0, 1, channels):
            raise UsageError(
                f"mean and std have {len(self.mean)} numbers and the pictures {channels} channels. "
                "Give one a channel, or one for all."
            )


def _between(low: float, high: float, u: Tensor) -> Tensor:
    return low + (high - low) * u


def _about(centre: float, strength: float) -> tuple[float, float]:
    return max(0.0, centre - strength), centre + strength


def _mixed(weak: Any, strong: Any, strength: float) -> Any:
    if isinstance(weak, tuple):
        return tuple(_mixed(*pair, strength) for pair in zip(weak, strong, strict=True))
    mixed = weak + (strong - weak) * strength
    return round(mixed) if isinstance(weak, int) else mixed


def _short(value: Any) -> str:
    return "–".join(f"{number:.3g}" for number in value) if isinstance(value, tuple) else f"{value:.3g}"


def _known(names: Iterable[str]) -> None:
    for name in names:
        if name not in OPERATIONS:
            raise unknown("operation", name, OPERATIONS)


def _check(holds: bool, policy: Policy, name: str, expected: str) -> None:
    if not holds:
        raise UsageError(f"Policy({name}={getattr(policy, name)!r}): {name} must be {expected}.")


def _shape(images: Tensor) -> torch.Size:
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise UsageError(f"A policy takes pictures [b, c, h, w]; these are {list(images.shape)}.")
    return images.shape


def _check_values(images: Tensor) -> None:
    if images.dtype.is_floating_point and len(images):
        low, high = images.aminmax()
        if not (low >= 0 and high <= 1):  # nor where they are NaN
            raise UsageError(
                f"Float pictures lie in [0, 1]; these in [{low:.3g}, {high:.3g}]. Divide by their largest possible "
                "value, or pass them as uint8 or uint16."
            )
