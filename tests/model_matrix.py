"""The models that people have: a student and a teacher of each family, and the layer pairs an expert names.

`python tests/model_matrix.py` runs all of it, eager and compiled, and writes the table of docs/models.md.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attention_transfer import AttentionTransfer, Distiller, build_model
from attention_transfer.pairs import Pair

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
COMMAND = "python tests/model_matrix.py"
CLASSES = 5

DEPTH = "one resolution: paired by depth"
TOKENS = f"tokens; {DEPTH}"
LAST = "channels last"


@dataclass(frozen=True)
class Row:
    """A student with its teacher, as `build_model` knows them.

    Attributes:
        family: what people call them.
        pairs: layers, as `--pairs` of the command writes them: "a,b", or "a:teacher_a,b:teacher_b".
        size: height and width of the images.
        options: for timm, to make a model smaller, or for smaller images.
        resize: the term's, where the two have maps of other sizes.
        slow: whether this row is for the slow tier only.
        note: what is out of the ordinary.
    """

    family: str
    student: str
    teacher: str
    pairs: str
    size: int = 64
    options: Mapping[str, Any] = field(default_factory=dict)
    resize: str | None = None
    slow: bool = False
    note: str = ""

    @property
    def expected(self) -> list[Pair]:
        both = [entry.split(":") for entry in self.pairs.split(",")]
        return [Pair(names[0], names[-1]) for names in both]

    def models(self) -> tuple[nn.Module, nn.Module]:
        student, teacher = (self._build(name) for name in (self.student, self.teacher))
        return student, teacher

    def _build(self, name: str) -> nn.Module:
        if not self.options:
            return build_model(name, num_classes=CLASSES)
        import timm

        return timm.create_model(name.removeprefix("timm:"), num_classes=CLASSES, **self.options)

    def batch(self) -> tuple[Tensor, Tensor]:
        return torch.randn(2, 3, self.size, self.size), torch.tensor([0, CLASSES - 1])

    def distiller(self, student: nn.Module, teacher: nn.Module, images: Tensor) -> Distiller:
        term = AttentionTransfer(1.0, resize=self.resize)  # type: ignore[arg-type]
        return Distiller(student, teacher, terms=[term], example_input=images)


def numbered(stem: str, numbers: Iterable[int | str]) -> str:
    return ",".join(f"{stem}{number}" for number in numbers)


LAYERS = numbered("layer", (1, 2, 3, 4))
STAGES = numbered("stages.", range(4))
DEPTHS = numbered("blocks.", (2, 5, 8, 11))
SMALL_VIT = {"img_size": 64}
SMALL_SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 32, "depths": (1, 1, 2, 1)}

ROWS = [
    Row("ResNet", "torchvision:resnet18", "torchvision:resnet34", LAYERS),
    Row("ResNet-D", "timm:resnet18d", "timm:resnet26d", LAYERS, slow=True),
    Row("ResNeXt", "timm:resnext26ts", "timm:resnext26ts", STAGES),
    Row("SE-ResNet", "timm:legacy_seresnet18", "timm:legacy_seresnet34", LAYERS),
    Row("SK-ResNet", "timm:skresnet18", "timm:skresnet34", LAYERS),
    Row("ResNeSt", "timm:resnest14d", "timm:resnest14d", LAYERS, slow=True),
    Row("Res2Net", "timm:res2net50_14w_8s", "timm:res2net50_14w_8s", LAYERS, slow=True),
    Row("wide ResNet", "wrn-16-1", "wrn-16-2", numbered("group", range(3)), size=32),
    Row(
        "VGG, with BatchNorm",
        "small_models:vgg",
        "small_models:vgg_bn",
        "features.1:features.2,features.4:features.6,features.9:features.13,features.14:features.20,"
        "features.19:features.27",
        note="no blocks: the last activation before each pool",
    ),
    Row(
        "DenseNet",
        "torchvision:densenet121",
        "torchvision:densenet121",
        numbered("features.denseblock", (1, 2, 3, 4)),
    ),
    Row("MobileNetV2", "timm:mobilenetv2_035", "timm:mobilenetv2_050", numbered("blocks.", (0, 1, 2, 4, 6))),
    Row(
        "MobileNetV3",
        "torchvision:mobilenet_v3_small",
        "torchvision:mobilenet_v3_large",
        "features.1:features.3,features.3:features.6,features.8:features.12,features.11:features.15",
    ),
    Row(
        "MobileNetV4",
        "timm:mobilenetv4_conv_small_050",
        "timm:mobilenetv4_conv_small",
        numbered("blocks.", range(4)),
    ),
    Row(
        "EfficientNet",
        "timm:efficientnet_lite0",
        "timm:efficientnet_b0",
        numbered("blocks.", (0, 1, 2, 4, 6)),
    ),
    Row(
        "EfficientNetV2",
        "timm:tf_efficientnetv2_b0",
        "timm:tf_efficientnetv2_b1",
        numbered("blocks.", (0, 1, 2, 4, 5)),
    ),
    Row("RegNet", "timm:regnetx_002", "timm:regnety_002", numbered("s", (1, 2, 3, 4))),
    Row("ConvNeXt", "timm:convnext_atto", "timm:convnext_femto", STAGES),
    Row(
        "ShuffleNetV2",
        "torchvision:shufflenet_v2_x0_5",
        "torchvision:shufflenet_v2_x1_0",
        numbered("stage", (2, 3, 4)),
    ),
    Row(
        "MNASNet",
        "torchvision:mnasnet0_5",
        "torchvision:mnasnet0_75",
        numbered("layers.", (7, 8, 9, 11, 13)),
    ),
    Row("MixNet", "timm:mixnet_s", "timm:mixnet_m", numbered("blocks.", (0, 1, 2, 4, 5))),
    Row(
        "Inception v3",
        "torchvision:inception_v3",
        "torchvision:inception_v3",
        "Conv2d_4a_3x3,Mixed_5d,Mixed_6e,Mixed_7c",
        size=107,
        note="images of 75 pixels or more; built without the auxiliary heads",
    ),
    Row(
        "GoogLeNet",
        "torchvision:googlenet",
        "torchvision:googlenet",
        "conv3,inception3b,inception4e,inception5b",
        note="built without the auxiliary heads",
    ),
    Row(
        "SqueezeNet",
        "torchvision:squeezenet1_1",
        "torchvision:squeezenet1_0",
        "features.4:features.5,features.7:features.10,features.12",
        resize="student",
        note='no padding: maps of 15 and 14 pixels, so the term needs resize="student"',
    ),
    Row("GhostNet", "timm:ghostnet_050", "timm:ghostnet_100", numbered("blocks.", (0, 2, 4, 6, 8))),
    Row(
        "DPN",
        "timm:dpn48b",
        "timm:dpn48b",
        "features.conv2_3,features.conv3_4,features.conv4_6,features.conv5_3",
        note="blocks give two tensors: the map is of the first, the residual path",
    ),
    Row(
        "HRNet",
        "timm:hrnet_w18_small",
        "timm:hrnet_w18_small",
        numbered("incre_modules.", range(4)),
        note="branches side by side: the last block of each, in the head",
    ),
    Row("RepVGG", "timm:repvgg_a0", "timm:repvgg_a1", f"stem,{STAGES}", slow=True),
    Row("NF-ResNet", "timm:nf_resnet26", "timm:nf_resnet26", STAGES, slow=True),
    Row("NF-RegNet", "timm:nf_regnet_b0", "timm:nf_regnet_b0", STAGES),
    Row("DLA", "timm:dla46_c", "timm:dla34", numbered("level", range(6))),
    Row("CSP-ResNet", "timm:cspresnet50", "timm:cspresnet50", STAGES, slow=True),
    Row("PoolFormer", "timm:poolformer_s12", "timm:poolformer_s12", STAGES),
    Row(
        "PVT v2",
        "timm:pvt_v2_b0",
        "timm:pvt_v2_b1",
        numbered("stages.", (f"{stage}.blocks.1" for stage in range(4))),
        note="stages end with a LayerNorm: the block before it",
    ),
    Row(
        "Twins",
        "timm:twins_pcpvt_small",
        "timm:twins_pcpvt_small",
        "blocks.0.0,blocks.1.0,blocks.2.1,blocks.3.0",
        options={"depths": (1, 1, 2, 1)},
    ),
    Row(
        "MobileViT",
        "timm:mobilevit_xxs",
        "timm:mobilevit_xs",
        numbered("stages.", range(5)),
        note="c = h = w in the first stage; the other taps tell the layout",
    ),
    Row(
        "EfficientViT",
        "timm:efficientvit_b0",
        "timm:efficientvit_b1",
        f"stem,{STAGES}",
        note="c = h = w in the first stage; the other taps tell the layout",
    ),
    Row("EdgeNeXt", "timm:edgenext_xx_small", "timm:edgenext_x_small", STAGES),
    Row(
        "CoAtNet",
        "timm:coatnet_pico_rw_224",
        "timm:coatnet_pico_rw_224",
        f"stem,{STAGES}",
        options=SMALL_VIT,
    ),
    Row(
        "MaxViT",
        "timm:maxvit_pico_rw_256",
        "timm:maxvit_pico_rw_256",
        f"stem,{STAGES}",
        options=SMALL_VIT,
    ),
    Row(
        "LeViT",
        "timm:levit_128s",
        "timm:levit_128s",
        numbered("stages.", range(3)),
        size=128,
        options={"img_size": 128},
        note="tokens; the stem of four strided layers has no stage",
    ),
    Row(
        "Swin",
        "timm:swin_tiny_patch4_window7_224",
        "timm:swin_tiny_patch4_window7_224",
        numbered("layers.", range(4)),
        options=SMALL_SWIN,
        note=LAST,
    ),
    Row(
        "Swin (torchvision)",
        "torchvision:swin_t",
        "torchvision:swin_t",
        numbered("features.", (1, 3, 5, 7)),
        slow=True,
        note=f"{LAST}; drops whole blocks at random in training",
    ),
    Row(
        "NesT",
        "timm:nest_tiny",
        "timm:nest_tiny",
        numbered("levels.", range(3)),
        options=SMALL_VIT,
        note="blocks of tokens inside a level",
    ),
    Row(
        "GC ViT",
        "timm:gcvit_xxtiny",
        "timm:gcvit_xxtiny",
        "stem.down.conv_block,stages.0,stages.1,stages.2,stages.3.blocks.1",
        size=96,
        options={"img_size": 96, "embed_dim": 32},
        note="the last stage ends with a LayerNorm: the block before it",
    ),
    Row(
        "Hiera of SAM 2",
        "timm:sam2_hiera_tiny",
        "timm:sam2_hiera_tiny",
        "blocks.0,blocks.2,blocks.9,blocks.11",
        options={"embed_dim": 16},
        note=f"{LAST}; windows wider than the map",
    ),
    Row(
        "PiT",
        "timm:pit_ti_224",
        "timm:pit_ti_224",
        numbered("transformers.", range(3)),
        options={"img_size": 64},
        note="maps, and tokens that fit no grid of whole patches",
    ),
    Row(
        "TNT",
        "timm:tnt_s_legacy_patch16_224",
        "timm:tnt_s_legacy_patch16_224",
        DEPTHS,
        options={"img_size": 64, "embed_dim": 64, "inner_dim": 12, "num_heads_outer": 4},
        note=f"{TOKENS}; blocks give pixels and patches, of which the patches are taken",
    ),
    Row(
        "ViT",
        "timm:vit_tiny_patch16_224",
        "timm:vit_tiny_patch16_224",
        DEPTHS,
        options=SMALL_VIT,
        note=TOKENS,
    ),
    Row(
        "DeiT",
        "timm:deit_tiny_patch16_224",
        "timm:deit_tiny_distilled_patch16_224",
        DEPTHS,
        options=SMALL_VIT,
        note=f"{TOKENS}; one prefix token against two",
    ),
    Row("XCiT", "timm:xcit_nano_12_p16_224", "timm:xcit_nano_12_p16_224", DEPTHS, note=TOKENS),
    Row(
        "CaiT",
        "timm:cait_xxs24_224",
        "timm:cait_xxs24_224",
        numbered("blocks.", (5, 11, 17, 23)),
        options=SMALL_VIT,
        note=TOKENS,
    ),
    Row(
        "MLP-Mixer",
        "timm:mixer_s32_224",
        "timm:mixer_s32_224",
        numbered("blocks.", (1, 3, 5, 7)),
        options=SMALL_VIT,
        note=TOKENS,
    ),
    Row(
        "ConvMixer",
        "timm:convmixer_768_32",
        "timm:convmixer_768_32",
        numbered("blocks.", (7, 15, 23, 31)),
        slow=True,
        note=DEPTH,
    ),
    Row(
        "ResNet (Hugging Face)",
        "small_models:resnet",
        "small_models:wide_resnet",
        numbered("resnet.encoder.stages.", range(4)),
    ),
    Row(
        "ConvNeXt (Hugging Face)",
        "small_models:convnext",
        "small_models:convnext",
        numbered("convnext.encoder.stages.", range(4)),
    ),
    Row(
        "ViT (Hugging Face)",
        "small_models:vit",
        "small_models:wide_vit",
        numbered("vit.layers.", (1, 2, 3, 5)),
        note=TOKENS,
    ),
    Row(
        "Swin (Hugging Face)",
        "small_models:swin",
        "small_models:swin",
        "swin.encoder.layers.0.blocks.1,swin.encoder.layers.1.blocks.1,swin.encoder.layers.2.blocks.1,swin.encoder.layers.3",
        note="tokens",
    ),
    Row(
        "PVT v2 (Hugging Face)",
        "small_models:pvt",
        "small_models:pvt",
        "pvt_v2.encoder.layers.0.blocks.0,pvt_v2.encoder.layers.1.blocks.0,pvt_v2.encoder.layers.2.blocks.1,pvt_v2.encoder.layers.3.blocks.0",
        note="tokens and maps",
    ),
]


def markdown(rows: Sequence[Row], results: Mapping[str, Sequence[str]]) -> str:
    """The table of docs/models.md; `results` has "eager" and "compiled" by family."""
    lines = ["| family | student ← teacher | pixels | layers | eager | compiled | note |", "|" + "---|" * 7]
    for row in rows:
        models = row.student if row.student == row.teacher else f"{row.student} ← {row.teacher}"
        layers = ", ".join(
            pair.student if pair.student == pair.teacher else f"{pair.student} ← {pair.teacher}"
            for pair in row.expected
        )
        cells = (row.family, models, str(row.size), layers, *results[row.family], row.note)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fill(page: str, table: str, *, marker: str = "matrix") -> str:
    """The page with the table between its markers."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{table}\n{end}", page, flags=re.DOTALL)


def step(row: Row, *, backend: str | None = None) -> tuple[Distiller, dict[str, Tensor], list[Tensor | None]]:
    """One training step: the distiller, its terms, and the gradient of the attention terms alone."""
    torch.manual_seed(0)
    student, teacher = row.models()
    images, labels = row.batch()
    if backend is not None:
        student = torch.compile(student, backend=backend)
    distiller = row.distiller(student, teacher, images)
    torch.manual_seed(0)
    out = distiller(images, labels)
    attention = torch.stack([term for name, term in out.terms.items() if name.startswith("at/")]).sum()
    gradient = torch.autograd.grad(
        attention, list(student.parameters()), retain_graph=True, allow_unused=True
    )
    out.loss.backward()
    return distiller, out.terms, list(gradient)


def works(row: Row, backend: str | None) -> bool:
    """Whether a step has the expected pairs and a gradient that is finite and not zero."""
    distiller, terms, gradient = step(row, backend=backend)
    found = [each for each in gradient if each is not None]
    finite = all(each.isfinite().all() for each in (*terms.values(), *found))
    return finite and any(each.count_nonzero() for each in found) and distiller.pairs == row.expected


def main() -> None:
    warnings.simplefilter("ignore")
    results = {}
    for row in ROWS:
        verdicts = []
        for backend in (None, "aot_eager"):
            torch.compiler.reset()
            try:
                verdicts.append("yes" if works(row, backend) else "no")
            except Exception as error:
                verdicts.append("no")
                print(f"{row.family}: {type(error).__name__}: {error}", file=sys.stderr)
        results[row.family] = verdicts
        print(row.family, *verdicts, flush=True)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), markdown(ROWS, results)), encoding="utf-8")


if __name__ == "__main__":
    main()
