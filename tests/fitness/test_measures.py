import pytest
import torch
from measures_literal import (
    acceptance_rate,
    flips,
    kl_divergence,
    negative_log_likelihood,
    top1_agreement,
    topk_kl_divergence,
)

from evopress.fitness import measures
from evopress.fitness.measures import HeldOut, KLDivergence, NegativeLogLikelihood, TopkKL
from evopress.fitness.population import PER_LOGIT
from evopress.models.head import Head
from experiments.benchmark.alive import DEVICE, Alive

T, D, V = 37, 16, 101


def draw(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


HEADS = {
    "plain": Head(draw(V, D, seed=0)),
    "bias": Head(draw(V, D, seed=0), bias=draw(V, seed=1)),
    "softcap": Head(draw(V, D, seed=0), softcap=5.0),
    "peaked": Head(draw(V, D, seed=0, scale=20.0)),
}


def logits_of(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    logits = hidden.double() @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


@pytest.fixture(params=HEADS)
def case(request):
    """A head, last hidden states of a base model and of a candidate, next tokens, and both models' logits in float64."""
    head = HEADS[request.param]
    base = draw(T, D, seed=2)
    hidden = base + draw(T, D, seed=3, scale=0.3)
    labels = torch.randint(V, (T,), generator=torch.Generator().manual_seed(4))
    return head, base, hidden, labels, logits_of(head, base), logits_of(head, hidden)


def measured(measure, base, hidden, labels, head):
    result = measure(hidden, measure.reference(base, labels, head), head)
    assert result.shape == (len(measure.names), len(hidden))
    assert result.dtype == torch.float32
    return result.double()


def close(mine, expected):
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=2e-5 * max(float(expected.abs().max()), 1.0))


def test_kl_divergence(case):
    head, base, hidden, labels, p, q = case
    expected = kl_divergence(p, q)
    assert expected.mean() > 0.01
    close(measured(KLDivergence(), base, hidden, labels, head)[0], expected)


@pytest.mark.parametrize("tokens", [1, 5, T - 1, T])
@pytest.mark.parametrize("measure", [KLDivergence(), NegativeLogLikelihood(), HeldOut()], ids=["kl", "nll", "held-out"])
def test_a_few_tokens_at_a_time_are_measured_as_all_at_once(case, measure, tokens, monkeypatch):
    head, base, hidden, labels, _, _ = case
    monkeypatch.setattr(measures, "_IN_CACHE", T * V)
    expected = measured(measure, base, hidden, labels, head)
    monkeypatch.setattr(measures, "_IN_CACHE", tokens * V + V - 1)
    close(measured(measure, base, hidden, labels, head), expected)


def test_a_divergence_far_below_the_logits_is_not_lost_in_their_rounding():
    head = Head(draw(20_000, D, seed=0, scale=3.0))
    base = draw(T, D, seed=2)
    hidden = base + draw(T, D, seed=3, scale=1e-3)
    expected = kl_divergence(logits_of(head, base), logits_of(head, hidden))
    assert 1e-6 < expected.mean() < 1e-4
    mine = measured(KLDivergence(), base, hidden, torch.zeros(T, dtype=torch.int64), head)[0]
    assert abs(float((mine - expected).mean())) < 1e-7


@pytest.mark.parametrize("k", [1, 2, 10, V])
def test_topk_kl_divergence(case, k):
    head, base, hidden, labels, p, q = case
    expected = topk_kl_divergence(p, q, k)
    close(measured(TopkKL(k), base, hidden, labels, head)[0], expected)
    if k == V:
        close(expected, kl_divergence(p, q))
    if k == 1:
        assert (expected == 0).all()


def test_negative_log_likelihood(case):
    head, base, hidden, labels, _, q = case
    close(measured(NegativeLogLikelihood(), base, hidden, labels, head)[0], negative_log_likelihood(q, labels))


def test_held_out_measures_them_all(case):
    head, base, hidden, labels, p, q = case
    labels[::3] = q.argmax(-1)[::3]  # or hardly any would be right
    kl, nll, top1, accepted, flipped = measured(HeldOut(), base, hidden, labels, head)
    close(kl, kl_divergence(p, q))
    close(nll, negative_log_likelihood(q, labels))
    assert torch.equal(top1, top1_agreement(p, q))
    assert 0 < top1.mean() < 1
    close(accepted, acceptance_rate(p, q))
    assert torch.equal(flipped, flips(p, q, labels))
    assert 0 < flipped.sum() <= (top1 == 0).sum()


@pytest.mark.parametrize("measure", [KLDivergence(), TopkKL(5), HeldOut()])
def test_a_model_has_no_divergence_from_itself(case, measure):
    head, base, _, labels, _, _ = case
    scale = max(float(head.logits(base).abs().max()), 1.0)
    assert measured(measure, base, base, labels, head)[0].abs().max() < 1e-6 * max(scale, 10)


@pytest.mark.parametrize("measure", [KLDivergence(), TopkKL(5)])
def test_divergence_is_never_negative_but_for_rounding(case, measure):
    head, base, _, labels, _, _ = case
    scale = max(float(head.logits(base).abs().max()), 10.0)
    for seed in range(20):
        hidden = base + draw(T, D, seed=seed, scale=10.0 ** -(seed % 6))
        assert measured(measure, base, hidden, labels, head)[0].min() > -1e-6 * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("measure", [KLDivergence(), NegativeLogLikelihood(), HeldOut()], ids=["kl", "nll", "held-out"])
def test_beside_a_host_a_logit_takes_no_more_than_is_counted(measure, dtype):
    """Of two chunks one after the other; small ones of T numbers are not looked at."""
    head = Head(torch.empty(5000, D, dtype=dtype, device="meta"))
    states, labels = torch.empty(T, D, dtype=dtype, device="meta"), torch.empty(T, dtype=torch.int64, device="meta")
    with Alive() as alive:
        for _ in range(2):
            reference = measure.reference(states, labels, head)
            for _ in range(2):
                measure(states, reference, head)
    assert 0.5 * PER_LOGIT < alive.peak[DEVICE] / (T * 5000) < 1.01 * PER_LOGIT


def test_half_precision_states_are_measured_in_float32():
    head = Head(draw(V, D, seed=0).bfloat16())
    base, hidden = draw(T, D, seed=2).bfloat16(), draw(T, D, seed=3).bfloat16()
    labels = torch.zeros(T, dtype=torch.int64)
    p, q = head.logits(base), head.logits(hidden)
    assert p.dtype == torch.float32
    close(measured(KLDivergence(), base, hidden, labels, head)[0], kl_divergence(p, q))


@pytest.mark.parametrize("k", [1, V // D, 7, V // D * T + 1, V * T // D + 1])
@pytest.mark.parametrize("name", HEADS)
def test_logits_of_some_tokens_are_those_of_all(name, k):
    """Of few tokens at once, and of so many that their rows of the head would be more than all logits are."""
    head, hidden = HEADS[name], draw(T, D, seed=2)
    tokens = torch.randint(V, (T, k), generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(head.logits_of(hidden, tokens), head.logits(hidden).gather(-1, tokens), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("k", [10, 100, 1000])
def test_the_sparse_divergence_takes_no_more_than_the_exact_one(k):
    head = Head(torch.empty(5000, 256, dtype=torch.bfloat16, device="meta"))
    states, labels = torch.empty(T, 256, dtype=torch.bfloat16, device="meta"), torch.empty(T, dtype=torch.int64, device="meta")
    with Alive() as alive:
        measure = TopkKL(k)
        measure(states, measure.reference(states, labels, head), head)
    assert alive.peak[DEVICE] / (T * 5000) < 1.01 * PER_LOGIT
