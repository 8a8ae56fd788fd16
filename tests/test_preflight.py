"""Every silent failure that a preflight must not let pass; each test provokes one."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from small_net import Net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention_transfer import (
    AttentionTransfer,
    Distiller,
    FlipSymmetry,
    InputGradientNorm,
    KnowledgeDistillation,
    Pair,
    Taps,
)
from attention_transfer.preflight import PreflightWarning
from attention_transfer.terms import Reading, Term

AT = AttentionTransfer(beta=1.0)
AT_RESIZED = AttentionTransfer(beta=1.0, resize="student")
PAIRS = [Pair("first", "first"), Pair("second", "second")]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])


def distiller(student: nn.Module | None = None, teacher: nn.Module | None = None, **changes) -> Distiller:
    options = {"pairs": PAIRS, "terms": [AT], **changes}
    student = Net(4) if student is None else student
    return Distiller(student, teacher or Net(6), **options)


# --- a healthy batch ----------------------------------------------------------------------------------------


def test_a_healthy_batch_passes_and_gives_the_shares(batch) -> None:
    report = distiller(terms=[AT, KnowledgeDistillation()]).preflight(*batch)
    assert not report.warnings
    for row in report.plan.rows:
        assert sum(row.shares.values()) == pytest.approx(1)
    assert set(report.plan.rows[0].shares) == {"ce", "kd", "at/first", "at/second"}
    assert set(report.plan.rows[1].shares) == {"ce", "kd", "at/second"}
    assert "share of the gradient" in str(report) and "ce " in str(report)


def test_shares_are_the_norms_of_the_gradients(batch) -> None:
    x, y = batch
    student = Net(4).eval()
    built = distiller(student)
    row = built.preflight(x, y).plan.rows[1]
    seen = built.observe(x, y, keep_features=True)
    addends = built.addends(seen)
    norms = {
        name: torch.autograd.grad(addends[name], seen.student.features[1], retain_graph=True)[0].norm()
        for name in ("ce", "at/second")
    }
    assert row.shares["ce"] == pytest.approx((norms["ce"] / sum(norms.values())).item(), rel=1e-5)


def test_preflight_leaves_no_trace(batch) -> None:
    built = distiller().train()
    state, random = copy.deepcopy(built.student.state_dict()), torch.get_rng_state()
    built.preflight(*batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in built.student.state_dict().items())
    assert all(parameter.grad is None for parameter in built.student.parameters())
    assert built.student.training


def test_preflight_under_no_grad_measures_gradients_all_the_same(batch) -> None:
    with torch.no_grad():
        assert distiller().preflight(*batch).plan.rows[0].shares["ce"] > 0


def test_preflight_of_a_channels_last_student_measures_all_terms(batch) -> None:
    """A tap gives a permuted view of (b, h, w, c); the network goes on with its base."""

    class ChannelsLast(Net):
        def __init__(self) -> None:
            super().__init__(4)
            self.swap = nn.Identity()

        def features(self, x: Tensor) -> Tensor:
            return self.second(self.swap(self.first(x).permute(0, 2, 3, 1).clone()).permute(0, 3, 1, 2))

    student = ChannelsLast()
    with Taps(student, ["swap"]) as taps:
        student(torch.randn(2, 3, 8, 6))
        assert taps.pop()["swap"].shape == (2, 4, 8, 6)
    built = distiller(student, pairs=[("swap", "first")])
    shares = built.preflight(torch.randn(6, 3, 8, 6), batch[1]).plan.rows[0].shares
    assert shares["ce"] > 0 and shares["at/swap"] > 0


def test_preflight_works_on_a_compiled_student(batch) -> None:
    built = distiller(torch.compile(Net(4), backend="aot_eager"))
    shares = built.preflight(*batch).plan.rows[0].shares
    assert shares["ce"] > 0


def test_preflight_works_where_a_part_is_compiled(batch) -> None:
    """Inside a compiled graph no gradient of the cross-entropy would be seen at a layer."""
    student = Net(4)
    student.second = torch.compile(student.second, backend="aot_eager")
    row = distiller(student, pairs=[("second.0", "second")]).preflight(*batch).plan.rows[0]
    assert row.shares["ce"] > 0


def test_preflight_leaves_ddp_ready_for_its_first_step(batch, tmp_path) -> None:
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        built = distiller(nn.parallel.DistributedDataParallel(Net(4)))
        built.preflight(*batch)
        for _ in range(2):
            built(*batch).loss.backward()
        assert all(parameter.grad is not None for parameter in built.student.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_distributed_tensors(batch, tmp_path) -> None:
    """The same values and shares as of plain tensors; a mixture is refused."""
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor, init_device_mesh

    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x, y = (distribute_tensor(each, mesh, [Shard(0)]) for each in batch)
        models = Net(4).eval(), Net(6)  # without dropout
        plain = distiller(*models, terms=[AT, KnowledgeDistillation()])
        spread = distiller(
            *(distribute_module(copy.deepcopy(each), mesh) for each in models),
            terms=[AT, KnowledgeDistillation()],
        )
        with Taps(spread.student, ["second"]) as taps, Taps(plain.student, ["second"]) as wanted:
            spread.student(x), plain.student(batch[0])
            torch.testing.assert_close(taps.pop()["second"].full_tensor(), wanted.pop()["second"])
        torch.testing.assert_close(spread(x, y).loss.full_tensor(), plain(*batch).loss)
        known, found = plain.preflight(*batch).plan, spread.preflight(x, y).plan
        assert found.shares == pytest.approx(known.shares, rel=1e-4)
        assert found.rows[1].shares == pytest.approx(known.rows[1].shares, rel=1e-4)
        with pytest.raises(ValueError, match=r"expected labels from 0 to 4, .* got 0 to 7"):
            spread.preflight(
                x, distribute_tensor(batch[1] + torch.tensor([0, 0, 0, 0, 3, 0]), mesh, [Shard(0)])
            )
        for built, images, labels, message in (
            (plain, x, y, "images and the teacher as DTensor or neither, got DTensor and Parameter"),
            (spread, *batch, "images and the teacher as DTensor or neither, got Tensor and "),
            (plain, batch[0], y, "labels and logits as DTensor or neither, got DTensor and Tensor"),
            (spread, x, batch[1], "labels and logits as DTensor or neither, got Tensor and DTensor"),
        ):
            for call in (built, built.preflight):
                with pytest.raises(TypeError, match=f"^Distiller: expected both {message}"):
                    call(images, labels)
    finally:
        torch.distributed.destroy_process_group()


# --- the teacher --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terms", "got"), [([], "no terms"), ([FlipSymmetry(1.0), InputGradientNorm(1.0)], "symmetry, min-l2")]
)
def test_a_teacher_that_no_term_asks(batch, terms: list[Term], got: str) -> None:
    x, y = batch
    message = f"preflight: expected a term that learns from the teacher, got {got}: the teacher would teach"
    with pytest.raises(ValueError, match=message):
        distiller(terms=terms).preflight(x, y)
    alone = Distiller(Net(4), None, terms=terms)
    with pytest.raises(ValueError, match=message):
        alone.preflight(x, y, teacher=Reading(torch.zeros(6, 5), {}))
    assert alone.preflight(x, y).plan.shares["ce"] > 0
    assert distiller(terms=[*terms, KnowledgeDistillation()]).preflight(x, y).plan.shares["kd"] > 0


def test_trainable_teacher(batch) -> None:
    built = distiller()
    built.teacher.head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"expected a frozen teacher, got head\.weight, head\.bias with"):
        built.preflight(*batch)


def test_teacher_in_training_mode(batch) -> None:
    built = distiller()
    built.teacher.first[1].train()
    with pytest.raises(
        ValueError, match=r"expected a teacher in evaluation mode, got first\.1 in training mode"
    ):
        built.preflight(*batch)


def test_teacher_whose_statistics_move_in_evaluation_mode(batch) -> None:
    class Stubborn(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.running_mean, self.running_var, training=True)

    teacher = Net(6)
    teacher.first[1] = Stubborn(6)
    with pytest.raises(
        ValueError, match=r"got changed buffers first\.1\.running_mean, first\.1\.running_var"
    ):
        distiller(teacher=teacher).preflight(*batch)


def test_teacher_with_another_normalisation_than_its_own(batch) -> None:
    """A teacher that is right on its own input and far off on the student's."""
    x, y = batch
    teacher = Net(6)
    teacher.forward = lambda images: (
        20 * (F.one_hot(y, 5) if images is not x else F.one_hot(4 - y, 5)).float()
    )
    built = Distiller(Net(4), teacher, terms=[KnowledgeDistillation()])
    with pytest.warns(PreflightWarning, match="the teacher does worse than chance on this batch"):
        built.preflight(x, y)
    mended = Distiller(Net(4), teacher, terms=[KnowledgeDistillation()], teacher_transform=torch.clone)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mended.preflight(x, y)


# --- the student and its taps -------------------------------------------------------------------------------


def test_student_without_trainable_parameters(batch) -> None:
    with pytest.raises(ValueError, match="expected a student with trainable parameters, got none"):
        distiller(Net(4).requires_grad_(False)).preflight(*batch)


def test_student_frozen_up_to_the_tap(batch) -> None:
    student = Net(4)
    student.first.requires_grad_(False)
    with pytest.raises(ValueError, match="expected an activation with a gradient at the student's first"):
        distiller(student).preflight(*batch)


def test_reentrant_checkpointing(batch) -> None:
    class Checkpointed(Net):
        reentrant = True

        def features(self, x: Tensor) -> Tensor:
            return checkpoint(super().features, x.requires_grad_(), use_reentrant=self.reentrant)

    with pytest.raises(ValueError, match="use_reentrant=True: pass use_reentrant=False"):
        distiller(Checkpointed(4)).preflight(*batch)
    Checkpointed.reentrant = False
    built = distiller(Checkpointed(4))
    built.preflight(*batch)
    built(*batch).loss.backward()


def test_tap_that_never_fires(batch) -> None:
    student = Net(4)
    student.unused = nn.Conv2d(4, 4, 1)
    with pytest.raises(ValueError, match="expected 'unused' to run once, got no call"):
        distiller(student, pairs=[("unused", "first")]).preflight(*batch)


def test_module_that_runs_twice(batch) -> None:
    class Shared(Net):
        def __init__(self) -> None:
            super().__init__(4)
            self.relu = nn.ReLU()

        def features(self, x: Tensor) -> Tensor:
            return self.relu(self.second(self.relu(self.first(x))))

    with pytest.raises(ValueError, match="expected 'relu' to run once in a forward pass, got 2 calls"):
        distiller(Shared(), pairs=[("relu", "first")]).preflight(*batch)
    distiller(Shared(), pairs=[("relu#0", "first")]).preflight(*batch)


def test_tap_overwritten_in_place(batch) -> None:
    student = Net(4)
    student.second = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU(inplace=True))
    with pytest.raises(ValueError, match=r"expected the output of 'second\.0' unchanged, got one that was"):
        distiller(student, pairs=[("second.0", "second")]).preflight(*batch)


def test_maps_of_unequal_size(batch) -> None:
    with pytest.raises(ValueError, match=r"student \(8, 8\) and teacher \(4, 4\).*the pair first <- second"):
        distiller(pairs=[("first", "second")]).preflight(*batch)


def test_map_of_one_position(batch) -> None:
    student = Net(4)
    student.second.append(nn.AdaptiveAvgPool2d(1))
    teacher = Net(6)
    teacher.second.append(nn.AdaptiveAvgPool2d(1))
    with pytest.raises(ValueError, match="expected a map at the student's second, got a single position"):
        distiller(student, teacher).preflight(*batch)


# --- the numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "where"),
    [("student", "the student's activation at first"), ("teacher", "the teacher's activation at first")],
)
def test_non_finite_activations(batch, side, where) -> None:
    built = distiller()
    with torch.no_grad():
        getattr(built, side).first[0].weight[0] = float("inf")
    with pytest.raises(ValueError, match=rf"expected finite numbers, got .* in {where}"):
        built.preflight(*batch)


def test_non_finite_images(batch) -> None:
    batch[0][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="got 1 NaN or infinite entries in the images"):
        distiller().preflight(*batch)


def test_gradient_that_overflows_its_precision(batch) -> None:
    """Finite activations and a finite term whose gradient leaves float16."""
    student = Net(4).half()
    student.first[1] = nn.Identity()
    with torch.no_grad():
        student.first[0].weight.mul_(1e-5)
        student.first[0].bias.zero_()
    pairs = [("first", "first")]
    built = Distiller(student, Net(6).half(), pairs=pairs, terms=[AttentionTransfer(beta=1e3)])
    with pytest.raises(
        ValueError, match="expected finite terms and gradients, got NaN or infinity from at/first"
    ):
        built.preflight(batch[0].half(), batch[1])


def test_term_of_zero_weight(batch) -> None:
    with pytest.raises(
        ValueError, match=r"got no gradient from at/first .*: the term is dead. Its weight is zero"
    ):
        distiller(terms=[AttentionTransfer(beta=0.0)]).preflight(*batch)


def test_student_that_is_a_copy_of_its_teacher(batch) -> None:
    teacher = Net(4).eval()
    built = distiller(copy.deepcopy(teacher), teacher).eval()
    with pytest.raises(ValueError, match=r"the term is dead. .*is the student a copy of the teacher?"):
        built.preflight(*batch)


def test_dead_layer(batch) -> None:
    student = Net(4)
    with torch.no_grad():
        student.second[0].weight.zero_()
        student.second[0].bias.fill_(-1)
    with pytest.raises(ValueError, match=r"got no gradient from at/second .* is zero everywhere"):
        distiller(student).preflight(*batch)


def test_dead_layer_of_the_teacher(batch) -> None:
    teacher = Net(6)
    with torch.no_grad():
        teacher.second[0].weight.zero_()
        teacher.second[0].bias.fill_(-1)
    with pytest.raises(
        ValueError, match=r"to learn from at the teacher's second, got zero everywhere on all"
    ):
        distiller(teacher=teacher).preflight(*batch)


def test_blank_maps_of_some_images(batch) -> None:
    x, y = batch
    student = Net(4)
    student.first[1] = nn.Identity()
    with torch.no_grad():
        student.first[0].bias.zero_()
    x[:3] = 0
    with pytest.warns(PreflightWarning, match="the student's activation at first is zero everywhere on 50%"):
        distiller(student).preflight(x, y)


class Normed(Net):
    """Ends with a norm over the channels, after which a map is flat but for the norm's epsilon."""

    def __init__(self, width: int, scale: float = 100.0) -> None:
        super().__init__(width)
        self.norm = nn.LayerNorm(width)
        with torch.no_grad():
            self.second[0].weight *= scale

    def features(self, x: Tensor) -> Tensor:
        return self.norm(super().features(x).movedim(1, -1)).movedim(-1, 1)


NORMED = ("norm", "norm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_two_maps_that_are_flat(batch, dtype) -> None:
    """The term is 0 but for rounding, and yet has a good share of the gradient."""
    x, y = batch[0].to(dtype), batch[1]
    built = distiller(Normed(16).to(dtype), Normed(32).to(dtype), pairs=[NORMED, PAIRS[0]])
    term = built(x, y).terms["at/norm"]
    assert 0 < term < (2e-3 if dtype == torch.bfloat16 else 1e-5)
    message = (
        r"maps that differ at the pair norm <- norm, got maps that are equal to rounding.*before the norm"
    )
    with pytest.raises(ValueError, match=message):
        built.preflight(x, y)
    repaired = distiller(Normed(16).to(dtype), Normed(32).to(dtype), pairs=[("norm.input", "norm.input")])
    assert not repaired.preflight(x, y).warnings


def test_two_maps_that_are_nearly_flat(batch) -> None:
    """A norm's epsilon of 1e-5 is much where the variance is 1e-2."""
    built = distiller(Normed(16, 1.0), Normed(32, 1.0), pairs=[NORMED])
    assert built(*batch).terms["at/norm"] < 1e-3
    with pytest.warns(PreflightWarning, match="map at norm is flat"):
        assert len(built.preflight(*batch).warnings) == 2


def test_flat_is_measured_of_the_map_that_the_term_compares(batch) -> None:
    """After a LayerNorm the sum of |x| is not the same everywhere."""
    term = AttentionTransfer(beta=1.0, p=1.0)
    assert not distiller(Normed(16), Normed(32), pairs=[NORMED], terms=[term]).preflight(*batch).warnings


def test_a_teacher_that_is_flat(batch) -> None:
    built = distiller(teacher=Normed(32), pairs=[("second", "norm")])
    with pytest.warns(
        PreflightWarning, match=r"the teacher's map at norm is flat.*pulls the student to a flat"
    ):
        report = built.preflight(*batch)
    assert len(report.warnings) == 1


def test_a_student_that_stays_flat(batch) -> None:
    built = distiller(Normed(16), pairs=[("norm", "second"), ("norm", "first")], terms=[AT_RESIZED])
    with pytest.warns(PreflightWarning, match=r"the student's map at norm is flat.*stays so, whatever"):
        report = built.preflight(*batch)
    assert len(report.warnings) == 1  # of two pairs


def test_maps_that_differ_by_rounding(batch) -> None:
    teacher = Net(4).eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.first[0].weight.mul_(1 + 1e-6)
        student.second[0].weight[0] *= 1 + 1e-6
    with pytest.raises(ValueError, match=r"equal to rounding.*is dead. Is the student a copy of the teacher"):
        distiller(student, teacher).eval().preflight(*batch)


def test_terms_that_drown_the_labels(batch) -> None:
    built = distiller(pairs=[("first", "first")], terms=[AttentionTransfer(beta=1e4)])
    with pytest.warns(
        PreflightWarning, match=r"at/first make up \d+% of the gradient at first.*smaller beta"
    ):
        report = built.preflight(*batch)
    assert len(report.warnings) == 1 and "warning: at/first make up" in str(report)


# --- the labels ---------------------------------------------------------------------------------------------


def test_labels_beyond_the_classes(batch) -> None:
    with pytest.raises(
        ValueError, match="expected labels from 0 to 4, as the student has 5 outputs, got 0 to 7"
    ):
        distiller().preflight(batch[0], torch.tensor([0, 1, 2, 3, 4, 7]))


class Features(Net):
    """Returns features of 512 entries, alone or before or after the logits."""

    def __init__(self, order: str) -> None:
        super().__init__(4)
        self.widen, self.order = nn.Linear(4, 512), order

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        mean = self.features(x).mean((2, 3))
        found = {"features": self.widen(mean), "logits": self.head(mean)}
        returned = [found[name] for name in self.order.split()]
        return returned if len(returned) > 1 else returned[0]


def test_features_that_were_taken_for_logits(batch) -> None:
    x, y = batch
    with pytest.warns(
        PreflightWarning, match=r"of 512 classes, .* the one at 1 has 5, .*Distiller\(logits=1\)"
    ):
        distiller(Features("features logits")).preflight(x, y)
    with pytest.warns(PreflightWarning, match=r"the teacher returns .*Distiller\(teacher_logits=1\)"):
        distiller(teacher=Features("features logits")).preflight(x, y)
    with pytest.warns(
        PreflightWarning, match="has 512 outputs, but no label of this batch is beyond 4, and the "
    ):
        distiller(Features("features"), terms=[AttentionTransfer(0.1)]).preflight(x, y)
    with pytest.warns(
        PreflightWarning, match=r"512 outputs, but no label of this batch is beyond 4\. Are they"
    ):
        Distiller(Features("features"), None).preflight(x, y)
    for order, options in [("logits features", {}), ("features logits", {"logits": 1}), ("logits", {})]:
        assert not Distiller(Features(order), None, **options).preflight(x, y).warnings


@pytest.mark.unchecked
def test_features_that_were_taken_for_logits_are_said_before_the_error_that_they_make(batch) -> None:
    with (
        pytest.warns(PreflightWarning, match=r"the student returns .*Distiller\(logits=1\)"),
        pytest.raises(ValueError, match=r"got student \(6, 512\) and teacher \(6, 5\)"),
    ):
        distiller(Features("features logits"), terms=[KnowledgeDistillation()]).preflight(*batch)


def test_many_classes_of_which_a_batch_shows_few_are_no_features() -> None:
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([3, 98, 41, 41])
    assert not Distiller(Net(4, classes=100), None).preflight(x, y).warnings
    assert not Distiller(Net(4, classes=100), None).preflight(x, torch.tensor([0, 0, 0, 1])).warnings


def test_labels_that_do_not_count_among_images(batch) -> None:
    x, y = batch
    y = y.where(torch.arange(6) < 3, -100)
    report = distiller(terms=[AttentionTransfer(0.1)]).preflight(x, y)
    assert report.plan.shares["ce"] > 0
    with pytest.raises(ValueError, match="expected labels that count, got none"):
        distiller().preflight(x, torch.full((6,), -100))


def test_the_number_of_classes_where_it_is_known(batch) -> None:
    built = distiller(terms=[AttentionTransfer(0.1)])
    assert built.preflight(*batch, classes=5).plan.shares["ce"] > 0
    with pytest.raises(
        ValueError, match=r"an output for each of 6 classes, got 5\. Let it return its logits"
    ):
        built.preflight(*batch, classes=6)


def test_a_student_of_one_output(batch) -> None:
    with pytest.raises(ValueError, match="a student of two outputs or more, got 1, whose cross-entropy is"):
        distiller(Net(4, classes=1)).preflight(batch[0], batch[1] * 0)


def test_an_automatic_weight_that_nobody_found(batch) -> None:
    built = distiller(terms=[AttentionTransfer("auto"), KnowledgeDistillation()])
    assert "beta=1 (auto, not found yet)" in str(built.plan())
    with pytest.warns(
        PreflightWarning, match=r'the weight "auto" of at was not found yet, and acts as 1\. Pass'
    ):
        built.preflight(*batch)
    built.settle({"kd": 0.5})
    with pytest.warns(PreflightWarning, match="was not found yet"):
        built.preflight(*batch)
    built.settle(built.balance(*batch))
    assert not built.preflight(*batch).warnings


@pytest.mark.unchecked
def test_logits_of_unequal_classes(batch) -> None:
    with pytest.raises(ValueError, match=r"got student \(6, 5\) and teacher \(6, 9\)\. Distillation needs"):
        distiller(teacher=Net(6, classes=9), terms=[KnowledgeDistillation()]).preflight(*batch)
