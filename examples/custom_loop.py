"""Attention transfer in a training loop of your own: real digits, under a minute on two CPU cores.

pip install "attention-transfer[train]"
python examples/custom_loop.py
"""

import torch

import attention_transfer as at
from attention_transfer.data import Batches, load_data


def train(distiller: at.Distiller, digits, epochs: int) -> None:
    """Nothing here knows of attention transfer: `distiller` may hold any terms, or none."""
    batches, augment = Batches(digits.train, 50, shuffle=True), digits.augment()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(batches))
    generator = torch.Generator().manual_seed(0)
    distiller.train()
    for epoch in range(epochs):
        for images, labels in batches:
            out = distiller(augment(images, generator), labels)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            schedule.step()
        print(f"  epoch {epoch + 1}:", "  ".join(f"{name} {term:.3f}" for name, term in out.terms.items()))


@torch.no_grad()
def error_on_test_images(model: torch.nn.Module, digits) -> float:
    predictions = model.eval()(digits.augment().normalise(digits.test.images)).argmax(1)
    return (predictions != digits.test.labels).float().mean().item() * 100


def main(epochs: int = 20) -> None:
    torch.manual_seed(0)
    digits = load_data("mnist-5k", max_train=500, validation=0)
    teacher = at.build_model("wrn-10-2", num_classes=10, in_channels=1)
    student = at.build_model("wrn-10-1", num_classes=10, in_channels=1)
    images, labels = next(iter(Batches(digits.train, 50, shuffle=True)))
    images = digits.augment().normalise(images)

    print("teacher")
    train(at.Distiller(teacher, None), digits, epochs)
    distiller = at.Distiller(student, teacher, terms=[at.AttentionTransfer(beta=1.0)], example_input=images)
    print(distiller.preflight(images, labels))
    print("student")
    train(distiller, digits, epochs)
    errors = {
        "teacher": error_on_test_images(teacher, digits),
        "student": error_on_test_images(student, digits),
    }
    print("test error:", ", ".join(f"{name} {error:.1f} %" for name, error in errors.items()))


if __name__ == "__main__":
    main()
