"""The steps that every client must support, with the installed version of tinker.

Run by ``old_clients`` in a client's own environment, so it knows the SDK alone. The last line it
writes is JSON: for each step either true or the sentence with which it failed.
"""

import io
import json
import os
import sys
import tarfile
import urllib.request
from collections.abc import Callable
from typing import Any

import tinker
from tinker import types

SKIPPED = "not in this version"
TOKENS = [[5, 6, 7, 8, 9], [30, 31, 32], [40, 41, 42, 43], [50, 51, 52], [60, 61, 62]]


class Failed(Exception):
    """A step failed; the message says how."""


def value(answer: Any) -> Any:
    """The result, where a version answers with a future."""
    return answer.result(timeout=60) if hasattr(answer, "result") else answer


def expect(is_true: bool, what: str) -> None:
    if not is_true:
        raise Failed(what)


def datum(tokens: list[int]) -> types.Datum:
    targets = tokens[1:]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": targets, "weights": [1.0] * len(targets)},
    )


class Flow:
    """The steps, in order; each may use the results of earlier ones."""

    def create(self) -> None:
        self.base_model = os.environ["BASE_MODEL"]
        self.service = tinker.ServiceClient()
        served = value(self.service.get_server_capabilities()).supported_models
        names = [model.model_name for model in served]
        expect(self.base_model in names, f"the server has {names}")
        self.model = value(
            self.service.create_lora_training_client(base_model=self.base_model, rank=8)
        )
        info = value(self.model.get_info())
        expect(info.model_data.model_name == self.base_model, f"info: {info}")

    def train(self) -> None:
        """130 datums a call: the first versions send 128 in one request."""
        data = [datum(tokens) for tokens in TOKENS] * 26
        losses = []
        for _ in range(4):
            loss = self.model.forward_backward(data, "cross_entropy")
            step = self.model.optim_step(types.AdamParams(learning_rate=1e-2))
            output = value(loss)
            value(step)
            expect(len(output.loss_fn_outputs) == len(data), "not one output for each datum")
            losses.append(output.metrics["loss:sum"])
        expect(losses == sorted(losses, reverse=True), f"losses: {losses}")

    def forward(self) -> None:
        output = value(self.model.forward([datum(TOKENS[0])], "cross_entropy"))
        self.logprobs = list(output.loss_fn_outputs[0]["logprobs"].data)
        expect(len(self.logprobs) == 4, f"logprobs: {self.logprobs}")
        total = output.metrics["loss:sum"]
        expect(abs(sum(self.logprobs) + total) < 1e-3, f"loss {total} of {self.logprobs}")

    def defaults(self) -> None:
        """AdamParams as the version has them when nothing is chosen."""
        value(self.model.forward_backward([datum(TOKENS[1])], "cross_entropy"))
        value(self.model.optim_step(types.AdamParams()))

    def refuse(self) -> None:
        """A bad datum fails by name, and the next request works."""
        bad = datum([5, 10**6, 7])
        try:
            value(self.model.forward_backward([bad], "cross_entropy"))
        except Exception as error:
            expect("data[0].model_input" in str(error), f"the refusal says: {error}")
        else:
            raise Failed("a token outside the vocabulary was taken")
        self.forward()

    def save(self) -> None:
        self.forward()
        self.saved_logprobs = self.logprobs
        self.path = value(self.model.save_state("state")).path
        self.sampler_path = value(self.model.save_weights_for_sampler("sampler")).path
        expect(self.path.startswith("tinker://"), f"path: {self.path}")

    def load(self) -> None:
        self.train()
        self.forward()
        expect(self.logprobs != self.saved_logprobs, "training changed nothing")
        value(self.model.load_state(self.path))
        self.forward()
        expect(near(self.logprobs, self.saved_logprobs), "loading did not bring the weights back")

    def create_from_state(self) -> None:
        made = value(self.service.create_training_client_from_state(self.path))
        output = value(made.forward([datum(TOKENS[0])], "cross_entropy"))
        logprobs = list(output.loss_fn_outputs[0]["logprobs"].data)
        expect(near(logprobs, self.saved_logprobs), "the new model is not what was saved")
        value(made.forward_backward([datum(TOKENS[0])], "cross_entropy"))
        value(made.optim_step(types.AdamParams(learning_rate=1e-3)))

    def resume(self) -> None:
        """A model that continues from the saved one, including its optimizer's state."""
        make = getattr(self.service, "create_training_client_from_state_with_optimizer", None)
        if make is None:
            raise NotImplementedError
        made = value(make(self.path))
        value(made.forward_backward([datum(TOKENS[0])], "cross_entropy"))
        value(made.optim_step(types.AdamParams(learning_rate=1e-3)))
        output = value(made.forward([datum(TOKENS[0])], "cross_entropy"))
        logprobs = list(output.loss_fn_outputs[0]["logprobs"].data)
        expect(not near(logprobs, self.saved_logprobs), "a step changed nothing")

    def sample(self) -> None:
        self.sampler = value(self.service.create_sampling_client(model_path=self.sampler_path))
        self.check_sampler(self.sampler)

    def sample_base(self) -> None:
        self.check_sampler(value(self.service.create_sampling_client(base_model=self.base_model)))

    def check_sampler(self, sampler: Any) -> None:
        answer = value(
            sampler.sample(
                prompt=types.ModelInput.from_ints([5, 6, 7]),
                num_samples=2,
                sampling_params=types.SamplingParams(max_tokens=4, temperature=0.0, stop=[]),
            )
        )
        first, second = answer.sequences
        expect(len(first.tokens) == 4, f"{len(first.tokens)} tokens instead of 4")
        expect(list(first.tokens) == list(second.tokens), "greedy samples differ")
        expect(first.stop_reason == "length", f"stop reason: {first.stop_reason}")
        expect(first.logprobs is not None and len(first.logprobs) == 4, "no logprobs")

    def score(self) -> None:
        """The sampler's log-probabilities of a prompt are the trainer's."""
        scores = list(value(self.sampler.compute_logprobs(types.ModelInput.from_ints(TOKENS[0]))))
        expect(scores[0] is None and len(scores) == 5, f"scores: {scores}")
        expect(near(scores[1:], self.saved_logprobs), f"{scores} against {self.saved_logprobs}")

    def list(self) -> None:
        rest = self.service.create_rest_client()
        run_id = self.path.removeprefix("tinker://").split("/")[0]
        found = value(rest.list_checkpoints(run_id)).checkpoints
        paths = sorted(checkpoint.tinker_path for checkpoint in found)
        expect(paths == sorted([self.path, self.sampler_path]), f"checkpoints: {paths}")

    def download(self) -> None:
        """The archive that versions before 0.36 fetch."""
        rest = self.service.create_rest_client()
        if not hasattr(rest, "get_checkpoint_archive_url"):
            raise NotImplementedError
        run_id, kind, name = self.sampler_path.removeprefix("tinker://").split("/")
        url = value(rest.get_checkpoint_archive_url(run_id, f"{kind}/{name}")).url
        with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310  # our server's
            content = io.BytesIO(answer.read())
        with tarfile.open(fileobj=content) as archive:
            names = archive.getnames()
        expect(any(name.endswith(".safetensors") for name in names), f"the archive has {names}")

    def delete(self) -> None:
        rest = self.service.create_rest_client()
        run_id, kind, name = self.path.removeprefix("tinker://").split("/")
        value(rest.delete_checkpoint(run_id, f"{kind}/{name}"))
        found = value(rest.list_checkpoints(run_id)).checkpoints
        expect([item.tinker_path for item in found] == [self.sampler_path], f"left: {found}")

    def custom_loss(self) -> None:
        def squares(data: Any, logprobs: Any) -> Any:
            loss = sum((item**2).sum() for item in logprobs)
            return loss, {"squares": float(loss)}

        if not hasattr(self.model, "forward_backward_custom"):
            raise NotImplementedError
        output = value(self.model.forward_backward_custom([datum(TOKENS[0])], squares))
        expect(output.metrics["squares"] > 0, f"metrics: {output.metrics}")
        value(self.model.optim_step(types.AdamParams(learning_rate=1e-3)))

    def close(self) -> None:
        if not hasattr(self.service, "close"):
            raise NotImplementedError
        value(self.service.close("success"))


STEPS: tuple[Callable[[Flow], None], ...] = (
    Flow.create,
    Flow.train,
    Flow.forward,
    Flow.defaults,
    Flow.refuse,
    Flow.save,
    Flow.load,
    Flow.create_from_state,
    Flow.resume,
    Flow.sample,
    Flow.sample_base,
    Flow.score,
    Flow.list,
    Flow.download,
    Flow.delete,
    Flow.custom_loss,
    Flow.close,
)


def near(ours: list[float], theirs: list[float]) -> bool:
    return all(abs(a - b) < 1e-3 for a, b in zip(ours, theirs, strict=True))


def run() -> dict[str, bool | str]:
    """Every step's outcome; after a failed creation nothing else is tried."""
    flow = Flow()
    outcomes: dict[str, bool | str] = {}
    for step in STEPS:
        try:
            step(flow)
            outcomes[step.__name__] = True
        except NotImplementedError:
            outcomes[step.__name__] = SKIPPED
        except Exception as error:
            outcomes[step.__name__] = f"{type(error).__name__}: {error}"[:300]
            if step is Flow.create:
                break
    return outcomes


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(run()) + "\n")
    sys.stdout.flush()
    os._exit(0)  # old versions leave threads behind that do not end
