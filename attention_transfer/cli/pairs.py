"""`attention-transfer pairs`."""

from __future__ import annotations

from attention_transfer._colours import print_safely
from attention_transfer.cli.parsing import PROGRAM, UsageError, parse, verb_parser
from attention_transfer.cli.wording import in_flags


def run(arguments: list[str]) -> None:
    parser = verb_parser("pairs", f"{PROGRAM} pairs --student resnet18 --teacher resnet34 --input-size 224")
    parser.add_argument("--student", required=True, help="The student's name.")
    parser.add_argument("--teacher", required=True, help="The teacher's name.")
    parser.add_argument("--input-size", type=int, default=224, help="Height and width of the images.")
    parser.add_argument("--in-channels", type=int, default=3, help="Channels of the images.")
    parser.add_argument("--num-classes", type=int, default=10, help="Number of classes.")
    flags = parse(parser, arguments)
    if min(flags.input_size, flags.in_channels, flags.num_classes) < 1:
        raise UsageError("pairs: expected --input-size, --in-channels and --num-classes of 1 or more.")
    import torch

    from attention_transfer import AttentionTransfer, Distiller, build_model
    from attention_transfer._channels import channels_instead
    from attention_transfer.models import why_not

    student, teacher = (
        build_model(
            name,
            num_classes=flags.num_classes,
            in_channels=flags.in_channels,
            image_size=flags.input_size,
        )
        for name in (flags.student, flags.teacher)
    )
    images = torch.zeros(2, flags.in_channels, flags.input_size, flags.input_size)
    for name, model in ((flags.student, student), (flags.teacher, teacher)):
        if reason := why_not(model, images.shape[1:]):
            if channels := channels_instead(model, images.shape[1:]):
                raise UsageError(
                    f"pairs: expected a model of images with {flags.in_channels} channels, got {name}, which "
                    f"takes {channels}. Pass another --in-channels, or another model."
                )
            raise UsageError(
                f"pairs: expected --input-size that {name} takes, got {flags.input_size}, at which it fails "
                f"({reason})."
            )
    plan = Distiller(student, teacher, terms=[AttentionTransfer(1.0)], example_input=images).plan()
    print_safely(in_flags(str(plan), {"--resize"}))  # of `train`, where it is to be passed
