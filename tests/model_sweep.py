"""Every family of timm that names its features, and every vision model of Hugging Face: what it does here.

Each is the teacher of a small ResNet, and then its student: the layers that are paired, whether these are the
maps that timm names, whether the maps are in the order of the image, what `preflight` says, and a step.
`python tests/model_sweep.py` writes the two tables of docs/models.md, in about ten minutes of one core;
names of families (`timm:coat transformers:swin`) show their rows alone.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
import transformers
from model_matrix import CLASSES, PAGE, fill
from torch import Tensor, nn
from transformers.models.auto import configuration_auto, modeling_auto

from attention_transfer import AttentionTransfer, Distiller, Taps, attention_map
from attention_transfer.locality import find_order
from attention_transfer.pairs import Stage, stages_to_store
from attention_transfer.preflight import PreflightWarning

LIBRARIES = ("timm", "transformers")
SIZE = 128  # of the images, where a model takes it

SHUFFLED = 0.7
"""The share of `locality.Finding` below which a map with the axes of an image is not in its order: shuffled
maps have up to 0.66, those of 4x4 places of convolutions that shift them by one from 0.74 on."""

# The smallest model of each of timm's modules.
TIMM = {
    "beit": "beit_base_patch16_224",
    "byoanet": "botnet26t_256",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
TIMM_OPTIONS: dict[str, dict[str, Any]] = {
    "beit": {"embed_dim": 192, "num_heads": 3},
    "vision_transformer_sam": {"embed_dim": 192, "num_heads": 3},
    "deepseek_vit": {"depth": 4, "embed_dim": 128, "num_heads": 2, "img_size": 126},
    "gemma4_vit": {"depth": 2},
    "naflexvit": {"embed_dim": 192, "num_heads": 3},
    "nasnet": {"stem_size": 32, "num_features": 1056},
    "qwen3_vit": {"depth": 4},
    "swin_transformer": {"depths": (2, 2, 2, 2), "embed_dim": 48},
    "swin_transformer_v2": {"depths": (2, 2, 2, 2), "embed_dim": 48},
    "swin_transformer_v2_cr": {"depths": (2, 2, 2, 2), "embed_dim": 48},
    "tnt": {"depth": 4},
    "twins": {"depths": (2, 2, 2, 2)},
    "xcit": {"depth": 4},
}

FIRST_GROUP = "timm's are the first group of blocks at a resolution, these the last"
HEAD = "timm's last is the head's 1x1 layer"
NEXT = "timm's are behind the activation that the next block begins with"
NORM = "timm's are behind a LayerNorm, these before it"
BLOCKS_ONLY = "timm names the blocks of the transformer only, not the stages in front"

# Where layers are not those of timm's `feature_info` at their resolution, why.
REASONS = {
    "csatv2": NORM,
    "coat": "timm's are of the last blocks, which return four maps in one tuple",
    "crossvit": "two branches, of which these are the first",
    "densenet": "timm's last is the norm behind the block",
    "fastvit": "timm's last is the stage, this the block of the head",
    "gcvit": NORM,
    "ghostnet": FIRST_GROUP,
    "hardcorenas": HEAD,
    "inception_resnet_v2": HEAD,
    "inception_v4": "two sizes of maps at stride 4, of which these are the last",
    "mobilenetv3": HEAD,
    "mobilenetv5": "the fusion in the head goes back to stride 16",
    "mobilevit": HEAD,
    "nasnet": NEXT,
    "nfnet": HEAD,
    "pnasnet": NEXT,
    "pvt_v2": NORM,
    "repghost": FIRST_GROUP,
    "swin_transformer_v2_cr": NORM,
    "vgg": "timm's are behind the pooling",
    "vitamin": BLOCKS_ONLY,
    "xception": NEXT,
    "xception_aligned": NEXT,
}

# Types of Hugging Face's vision models that are left out, and why.
LEFT_OUT = {
    "dinat": "needs natten, which is to be built",
    "imagegpt": "takes tokens in place of images",
    "perceiver": "has latents in place of maps",
    "shieldgemma2": "a language model",
    "siglip2": "takes patches in place of images",
    "timm_backbone": "a model of timm",
    "timm_wrapper": "a model of timm",
    "tipsv2": "the vision model has a type of its own",
}


# What else than `_small` finds they need to be small.
TRANSFORMERS_OPTIONS: dict[str, dict[str, Any]] = {
    "efficientnet": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    "rf_detr_dinov2": {"patch_size": 16, "num_windows": 2},
}


@dataclass(frozen=True)
class Member:
    """A family: a module of timm, or a type of Hugging Face's models."""

    library: str
    family: str

    def __str__(self) -> str:
        return f"{self.library}:{self.family}"

    def build(self) -> tuple[str, nn.Module, int]:
        """What the model is called, the model, and the height and width of its images."""
        torch.manual_seed(0)
        build = _build_timm if self.library == "timm" else _build_transformers
        name, model, size = build(self.family)
        _wake(model, torch.randn(2, 3, size, size))
        return name, model, size


def members() -> list[Member]:
    return [Member("timm", family) for family in TIMM] + [
        Member("transformers", family) for family in vision_types() if family not in LEFT_OUT
    ]


def vision_types() -> list[str]:
    """Hugging Face's types of models that are a backbone or classify images."""
    mappings = (
        modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    )
    return sorted({name for mapping in mappings for name in mapping})


# --------------------------------------------------------------------------------------------- building


def _build_timm(family: str) -> tuple[str, nn.Module, int]:
    """Smaller images than the model's own, where it takes them."""
    name = TIMM[family]
    options = TIMM_OPTIONS.get(family, {})
    given = options.get("img_size")
    for more, size in (({"img_size": given or SIZE}, given or SIZE), ({}, SIZE), ({}, None)):
        if family == "crossvit" and size is not None:  # enlarges all images to its own size
            continue
        try:
            model = timm.create_model(name, num_classes=CLASSES, **{**options, **more})
            size = size or model.default_cfg["input_size"][-1]
            with torch.no_grad():
                model.eval()(torch.randn(2, 3, size, size))
        except (TypeError, RuntimeError, AssertionError, ValueError, IndexError):
            continue
        return name, model, size
    raise ValueError(f"{name}: no size of images fits")


def _build_transformers(family: str) -> tuple[str, nn.Module, int]:
    config = configuration_auto.CONFIG_MAPPING[family]
    small = _small(config()) | TRANSFORMERS_OPTIONS.get(family, {})
    classifier = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.get(family)
    if classifier is None:
        name = modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES[family]
        return name, Headed(getattr(transformers, name)(config(**small))), SIZE
    name = classifier if isinstance(classifier, str) else classifier[0]
    return name, getattr(transformers, name)(config(num_labels=CLASSES, **small)), SIZE


def _small(config: Any) -> dict[str, Any]:
    """Options of a small model: four blocks, or two a stage, of images of `SIZE` pixels."""
    vision = getattr(config, "vision_config", None)
    if vision is not None:
        return {"vision_config": _small(vision)}
    found = {}
    for key, value in {
        "image_size": SIZE,
        "hidden_size": 48,
        "intermediate_size": 96,
        "window_size": 4,
    }.items():
        known = getattr(config, key, None)
        if known is not None and not (key == "hidden_size" and hasattr(config, "depths")):
            found[key] = [value] * len(known) if isinstance(known, list | tuple) else value
    if isinstance(getattr(config, "num_hidden_layers", None), int) and "hidden_size" in found:
        found |= {"num_hidden_layers": 4, "num_attention_heads": 4}
    if "depths" in config.to_dict() and "block_configs" not in config.to_dict():
        found["depths"] = [min(depth, 2) for depth in config.depths]
    return found


class Headed(nn.Module):
    """A backbone with a classifier on its last map."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.LazyLinear(CLASSES)
        with torch.no_grad():
            self(torch.randn(1, 3, SIZE, SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).feature_maps[-1].flatten(2).mean(2))


def _wake(model: nn.Module, images: Tensor) -> None:
    """As a training leaves it: no block is the identity by its weights, and statistics are of what passes."""
    for name, parameter in model.named_parameters():
        scale = parameter.numel() == max(parameter.shape, default=0) and not name.endswith("bias")
        if scale and parameter.abs().max() <= 0.1 and parameter.min() == parameter.max():
            nn.init.ones_(parameter)  # of a residual branch, or of the norm at its end
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm in norms:
        norm.momentum = 0.1


# --------------------------------------------------------------------------------------------- looking


@dataclass(frozen=True)
class Row:
    """What was found of a family.

    Attributes:
        layers: what is paired, in the order of execution.
        notes: why layers are not timm's, and what is refused or warned of.
    """

    member: Member
    model: str
    size: int
    layers: list[str]
    notes: list[str]

    def __str__(self) -> str:
        layers = ", ".join(self.layers) or "refused"
        return f"| {self.member.family} | {self.model} | {self.size} | {layers} | {'; '.join(self.notes)} |"


def look(member: Member) -> Row:
    name, model, size = member.build()
    images = torch.randn(2, 3, size, size)
    try:
        stages = stages_to_store(model, images)
    except ValueError as error:
        return Row(member, name, size, [], [_refusal(error)])
    notes = list(_beside_timm(member, model.eval(), images, stages)) if member.library == "timm" else []
    notes += _order(model, images, stages)
    resnet = timm.create_model("test_resnet", num_classes=CLASSES)
    for role, student, teacher in (("teacher", resnet, model), ("student", model, resnet)):
        notes += [note for note in _step(student, teacher, images, role) if note not in notes]
    return Row(member, name, size, [stage.name for stage in stages], notes)


def _order(model: nn.Module, images: Tensor, stages: list[Stage]) -> Iterator[str]:
    """Maps with the axes of an image that do not follow it; at tokens, and doubtful axes, preflight looks."""
    names = [stage.name for stage in stages]
    with torch.no_grad(), Taps(model, names) as taps:
        model(images)
        taps.pop()
    told = {name: each.kind for name, each in taps.layouts.items() if each.kind != "tokens"}
    called = [name.partition("@")[0] + f"@{kind}" for name, kind in told.items()]
    for name, finding in find_order(model, called, images).items():
        if not finding.in_order and finding.share < SHUFFLED:
            yield f"{name} is not in the order of the image"


def _step(student: nn.Module, teacher: nn.Module, images: Tensor, role: str) -> Iterator[str]:
    """What preflight says, and whether a step changes what it should."""
    labels = torch.tensor([0, CLASSES - 1])
    term = AttentionTransfer(1.0, resize="student")
    student.requires_grad_(True).train()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", PreflightWarning)
            distiller = Distiller(student, teacher, terms=[term], example_input=images)
            distiller.preflight(images, labels)
    except ValueError as error:
        yield f"as {role}: {_refusal(error)}"
        return
    yield from (_short(str(each.message)) for each in caught if "flat" in str(each.message))
    distiller(images, labels).loss.backward()
    gradients = [each.grad for each in student.parameters() if each.grad is not None]
    if not all(each.isfinite().all() for each in gradients):
        yield f"as {role}: gradients that are not finite"
    if not any(each.count_nonzero() for each in gradients):
        yield f"as {role}: no gradient"
    student.zero_grad()


def _short(warning: str) -> str:
    """What is flat, without the number."""
    return re.sub(r"preflight: the (?:student|teacher)'s map at (\S+) is flat.*", r"\1 is flat", warning)


def _refusal(error: ValueError) -> str:
    """Its first sentence, without the function and the numbers."""
    text = re.sub(r"[0-9.]+(e-\d+)?%", "…", str(error)).replace("|", "\\|")
    return re.match(r"[^:]*: (.*?, got .*?)\.(?= [A-Z]|$)", text, re.DOTALL)[1]


def _beside_timm(member: Member, model: nn.Module, images: Tensor, stages: list[Stage]) -> Iterator[str]:
    """How the maps are not those of timm's `feature_info`: the last of a resolution, or any of the blocks."""
    found = list(_differences(model, images, stages))
    reason = REASONS.get(member.family)
    if reason and not found:
        yield f"no longer so: {reason}"
    yield from [reason, *found] if reason and found else found


def _differences(model: nn.Module, images: Tensor, stages: list[Stage]) -> Iterator[str]:
    with torch.no_grad(), Taps(model, [stage.name for stage in stages]) as taps:
        model(images)
        ours = {name: attention_map(features) for name, features in taps.pop().items()}
        theirs = [
            attention_map(each) for each in model.forward_intermediates(images, intermediates_only=True)
        ]
    sizes = {each.shape[1:] for each in theirs}
    last = {each.shape[1:]: each for each in theirs}
    several = len(ours) > len({each.shape[1:] for each in ours.values()})
    candidates = theirs if several else list(last.values())
    other = [
        name
        for name, each in ours.items()
        if each.shape[1:] in sizes
        and not any(
            each.shape == map_.shape and torch.dist(each, map_) < 1e-3 * each.norm() for map_ in candidates
        )
    ]
    if other:
        yield f"not timm's: {', '.join(other)}"
    mine = [each.shape[1:] for each in ours.values()]
    for info, each in zip(model.feature_info, theirs, strict=True):
        if each.shape[1:] not in mine and last[each.shape[1:]] is each:
            yield f"timm's {info['module'] or 'first'} (stride {info['reduction']}) makes no stage"
    more = [name for name, each in ours.items() if each.shape[1:] not in sizes]
    if more:
        yield f"timm has none at {', '.join(more)}"


def table(library: str, rows: list[Row]) -> str:
    lines = ["| family | model | pixels | layers | note |", "|" + "---|" * 5, *map(str, rows)]
    if library == "transformers":
        lines += [f"| {family} | | | left out | {why} |" for family, why in LEFT_OUT.items()]
    return "\n".join(lines)


def main(names: list[str]) -> None:
    rows = []
    for member in members():
        if not names or str(member) in names:
            start = time.perf_counter()
            rows.append(look(member))
            print(f"{time.perf_counter() - start:.1f} s", rows[-1], flush=True)
    page = PAGE.read_text(encoding="utf-8")
    for library in () if names else LIBRARIES:
        theirs = [row for row in rows if row.member.library == library]
        page = fill(page, table(library, theirs), marker=library)
    if not names:
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
