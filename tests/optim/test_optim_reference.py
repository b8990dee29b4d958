"""Ten steps and more of every optimizer, in float64, against implementations that share no code with it."""

from __future__ import annotations

import numpy as np
import pytest

from mpitrain.optim import OPTIMIZERS, make_optimizer

CASES = [
    ("gd", {}, "SGD", {}),
    ("sgd", {"weight_decay": 0.1}, "SGD", {"weight_decay": 0.1}),
    ("momentum", {"momentum": 0.8, "weight_decay": 0.1}, "SGD", {"momentum": 0.8, "weight_decay": 0.1}),
    ("nesterov", {"weight_decay": 0.1}, "SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("adagrad", {"weight_decay": 0.1}, "Adagrad", {"weight_decay": 0.1}),
    ("rmsprop", {"alpha": 0.9, "weight_decay": 0.1}, "RMSprop", {"alpha": 0.9, "weight_decay": 0.1}),
    ("adam", {}, "Adam", {}),
    ("adam", {"betas": (0.8, 0.9), "weight_decay": 0.1, "eps": 1e-3},
     "Adam", {"betas": (0.8, 0.9), "weight_decay": 0.1, "eps": 1e-3}),
    ("adamw", {}, "AdamW", {}),
    ("adamw", {"weight_decay": 0.3}, "AdamW", {"weight_decay": 0.3}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "torch_name", "torch_options"), CASES)
def test_every_step_equals_torch(name, options, torch_name, torch_options, layout, start, gradients, train):
    torch = pytest.importorskip("torch")
    params = start()
    trained = [segment for segment in layout if segment.group != "statistics"]
    tensors = {s.name: torch.tensor(params.views[s.name], requires_grad=True) for s in trained}
    kept = dict(torch_options)
    decay = kept.pop("weight_decay", None)
    groups = [
        {"params": [tensors[s.name] for s in trained if s.group == "decay"]},
        {"params": [tensors[s.name] for s in trained if s.group == "no_decay"], "weight_decay": 0.0},
    ]
    if decay is not None:
        groups[0]["weight_decay"] = decay
    reference = getattr(torch.optim, torch_name)(groups, lr=0.05, **kept)
    steps = train(make_optimizer(name, **options), params, gradients, 0.05)
    for grads, found in zip(gradients, steps, strict=True):
        for segment in trained:
            tensors[segment.name].grad = torch.tensor(grads.views[segment.name])
        reference.step()
        for segment in trained:
            expected = tensors[segment.name].detach().numpy()
            np.testing.assert_allclose(found.views[segment.name], expected, rtol=1e-12, atol=1e-13)


def test_every_optimizer_has_a_reference():
    assert {case[0] for case in CASES} | {"lamb"} == set(OPTIMIZERS)


@pytest.mark.parametrize("adapt", ["decay", "trained"])
def test_every_step_of_lamb_equals_the_paper(adapt, layout, start, gradients, train):
    params, reference = start(), start().views
    trained = [segment for segment in layout if segment.group != "statistics"]
    m = {s.name: np.zeros(s.shape) for s in trained}
    v = {s.name: np.zeros(s.shape) for s in trained}
    steps = train(make_optimizer("lamb", weight_decay=0.2, adapt=adapt), params, gradients, 0.05)
    for t, (grads, found) in enumerate(zip(gradients, steps, strict=True), start=1):
        for segment in trained:
            name, decays = segment.name, segment.group == "decay"
            x, g = reference[name], grads.views[name]
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            r = (m[name] / (1 - 0.9**t)) / (np.sqrt(v[name] / (1 - 0.999**t)) + 1e-6)
            update = r + (0.2 * x if decays else 0.0)
            ratio = np.linalg.norm(x) / np.linalg.norm(update) if (decays or adapt == "trained") and x.size else 1.0
            x -= 0.05 * ratio * update
            np.testing.assert_allclose(found.views[name], x, rtol=1e-12, atol=1e-13)
