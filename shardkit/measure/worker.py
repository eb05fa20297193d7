"""One load of one checkpoint, timed phase by phase, in a process of its own.

Stands alone: it is run by path with whatever interpreter it is given (Python 3.9 up, transformers 4.37
to 5.x), so it imports nothing beyond the standard library, torch and transformers: shardkit only for a load
within a memory budget, or into memory from a slow mount, which nothing else does.

The job comes as JSON in the file that the last argument names. What happened goes, an event a line, to the
file that the job names: not to stdout, where libraries print, and not through a pipe, which could fill. An
event written is kept even if the next moment brings SIGKILL.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import resource
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

PACKAGE = str(Path(__file__).absolute().parents[1])
PROMPT = "The quick brown fox jumps over the lazy dog"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.txt", "vocab.json")
CODE_OPTIONS = ("trust_remote_code", "revision", "code_revision")


def reset_peak() -> bool:
    """Set the kernel's peak (VmHWM) back to what is resident now; False where that cannot be done."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def _proc_numbers(path: str, *names: str) -> dict[str, int]:
    found = {}
    with suppress(OSError, ValueError, IndexError), open(path) as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in names:
                found[name] = int(value.split()[0])
    return found


def _bytes(status: dict[str, int], *names: str) -> int | None:
    return sum(status[name] for name in names) * 1024 if status.keys() >= set(names) else None


def _counters() -> dict[str, Any]:
    """Return CPU seconds of all threads, major page faults, and bytes read from the disk, where known."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "user_seconds": usage.ru_utime,
        "system_seconds": usage.ru_stime,
        "major_faults": usage.ru_majflt,
        **_proc_numbers("/proc/self/io", "read_bytes"),
    }


class Reporter:
    """Writes events, and clocks phases."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def send(self, event: str, **fields: Any) -> None:
        """Append one event."""
        os.write(self._file, (json.dumps({"event": event, **fields}) + "\n").encode())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Clock what happens inside, and take the kernel's own memory peak of it."""
        peak_reset = reset_peak()
        self.send("begin", name=name, at=time.monotonic(), peak_reset=peak_reset)
        before, start = _counters(), time.monotonic()
        yield
        wall = time.monotonic() - start
        after = _counters()
        used = {counter: count - before[counter] for counter, count in after.items() if counter in before}
        status = _proc_numbers("/proc/self/status", "VmHWM", "RssAnon", "RssShmem", "RssFile")
        self.send(
            "end",
            name=name,
            at=start,
            wall_seconds=wall,
            **used,
            process_cpu_seconds=after["user_seconds"] + after["system_seconds"],
            peak_total_bytes=_bytes(status, "VmHWM") if peak_reset else None,
            anonymous_bytes=_bytes(status, "RssAnon", "RssShmem"),
            file_bytes=_bytes(status, "RssFile"),
        )


class Load:
    """The steps of a load, as a user's own script would take them."""

    def __init__(self, job: dict[str, Any], reporter: Reporter) -> None:
        self.job, self.reporter, self.folder = job, reporter, job["folder"]
        self.reading = _start_reading(job)
        self.tokenizer: Any = None

    def run(self) -> None:
        """Take all steps; what goes wrong is raised."""
        with self.reporter.phase("imports"):
            self.imports()
        self._noted("versions unknown", lambda: self.reporter.send("stack", **self._stack()))
        if any(os.path.exists(os.path.join(self.folder, name)) for name in TOKENIZER_FILES):
            with self.reporter.phase("tokenizer"):
                self.load_tokenizer()
        ids = self.prompt_ids()
        try:
            with self.reading:
                self._load(ids)
            if self.job["generate"]:
                self.reporter.send("tokens", ids=self._tokens(ids))
        finally:  # how much a GPU held counts most where it was not enough
            self._noted("peak of the GPU unknown", self._say_device_peak)

    def _noted(self, what: str, step: Callable[[], Any], otherwise: Any = None) -> Any:
        """Take a step that only the report needs: one that fails is noted, and no failure of the load."""
        try:
            return step()
        except Exception as error:
            self.reporter.send("note", text=f"{what}: {_one_line(error)}")
            return otherwise

    def imports(self) -> None:
        """Import all that the load will need: that costs seconds, once, and is not the load's doing."""
        import safetensors.torch  # noqa: F401
        import torch
        import transformers

        with suppress(ImportError):
            import accelerate  # noqa: F401
        self.torch, self.transformers = torch, transformers
        self.own_load = self._own_load()
        self.loader = next(
            found for name in self.job["loaders"] if (found := getattr(transformers, name, None))
        )
        self.config: Any = None
        with suppress(Exception):  # what cannot be read so, the load may not need, or it says why itself
            self.config = transformers.AutoConfig.from_pretrained(self.folder, **self._code_options())
        self._noted("imports by the model may count as load time", self._import_model)
        _ = transformers.AutoTokenizer
        for gpu in self._gpus():
            torch.zeros(1, device=f"cuda:{gpu}")

    def _own_load(self) -> Any:
        """Return what loads in place of `from_pretrained`, if anything does."""
        if self.job["loader"]:
            return runpy.run_path(self.job["loader"])["load"]
        if self.job["by_shardkit"]:
            return _shardkit("load.load_model").load_model
        return None

    def _import_model(self) -> None:
        for module in {type(config).__module__ for config in _with_parts(self.config)}:
            if module.startswith("transformers."):
                with suppress(ImportError):
                    importlib.import_module(module.replace("configuration_", "modeling_"))
        own = getattr(self.config, "auto_map", None) or {}
        if self.job["options"].get("trust_remote_code") and self.loader.__name__ in own:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            reference = own[self.loader.__name__]
            model = get_class_from_dynamic_module(reference, self.folder, **self._code_options())
            with self.torch.device("meta"):  # what it imports only when it is made
                model(self.config)

    def _gpus(self) -> list[int]:
        """Return the numbers of the GPUs that the load may use; the others are not so much as woken."""
        cuda, options = self.torch.cuda, self.job["options"]
        kind, _, number = self.job["device"].partition(":")
        if kind == "cpu" and options.get("device_map") not in (None, "cpu"):
            kind = "auto"  # by name or by an option of transformers
        if kind == "cpu" or not cuda.is_available():
            return []
        return [int(number or 0)] if kind == "cuda" else list(range(cuda.device_count()))

    def _stack(self) -> dict[str, Any]:
        from importlib.metadata import PackageNotFoundError, version

        versions = {"python": sys.version.split()[0], "torch": self.torch.__version__}
        for name in ("transformers", "safetensors", "accelerate", "huggingface_hub"):
            with suppress(PackageNotFoundError):
                versions[name] = version(name)
        return {
            "versions": versions,
            "threads": self.torch.get_num_threads(),
            "gpu": " + ".join(map(self.torch.cuda.get_device_name, self._gpus())) or None,
        }

    def load_tokenizer(self) -> None:
        """Load the tokenizer; the load does without one that does not load."""
        load, options = self.transformers.AutoTokenizer.from_pretrained, self._code_options()
        self.tokenizer = self._noted("tokenizer not loaded", lambda: load(self.folder, **options))

    def prompt_ids(self) -> Any:
        """Return the prompt's token ids; without a tokenizer the same count of fixed ids."""
        ids: Any = None
        if self.tokenizer is not None:
            ids = self._noted(
                "prompt not tokenized",
                lambda: [int(i) for i in self.tokenizer(self.job["prompt"] or PROMPT)["input_ids"]],
            )
        # A part of the model may know fewer tokens than another: the smallest suits all.
        sizes = [getattr(config, "vocab_size", None) for config in _with_parts(self.config)]
        vocabulary = min((size for size in sizes if isinstance(size, int) and size > 0), default=2)
        return self.torch.tensor([[token % vocabulary for token in ids or range(1, 10)]])

    def _code_options(self) -> dict[str, Any]:
        """Return the options that config and tokenizer need too, where the model brings its own code."""
        options = self.job["options"]
        return {name: options[name] for name in CODE_OPTIONS if name in options}

    def _options(self, ids: Any) -> dict[str, Any]:
        options: dict[str, Any] = {**self.job["options"]}
        if self.job["dtype"] is not None:
            name = "dtype" if int(self.transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
            options[name] = getattr(self.torch, self.job["dtype"], self.job["dtype"])
        if self.job["device"] != "cpu" and "distributed_config" not in options:
            options["device_map"] = self.job["device"]
        if self.job["by_shardkit"]:
            context = -(-(ids.shape[1] + self.job["generate"]) // 64) * 64
            options |= {"max_memory": self.job["max_memory"], "context_tokens": context, "prefetch": False}
        return options

    def _load(self, ids: Any) -> None:
        options, load = self._options(ids), self.own_load or self.loader.from_pretrained
        more = {} if self.own_load else {"output_loading_info": True}
        try:
            loaded = self._clocked(load, {**options, **more})
        except TypeError as error:  # a model's own code may not know that argument
            if not more or "output_loading_info" not in str(error):
                raise
            loaded = self._clocked(load, options)
        self.model, found = loaded if isinstance(loaded, tuple) else (loaded, {})
        self.reporter.send("model", name=type(self.model).__name__)
        self._noted("whether all tensors fit is unknown", lambda: self._say_what_did_not_fit(found))

    def _clocked(self, load: Callable[..., Any], options: dict[str, Any]) -> Any:
        with self.reporter.phase("load"):
            loaded = load(self.folder, **options)
            self._synchronize()
        return loaded

    def _say_device_peak(self) -> None:
        if gpus := self._gpus():
            self.reporter.send("device", peak_bytes=sum(map(self.torch.cuda.max_memory_allocated, gpus)))

    def _say_what_did_not_fit(self, found: dict[str, Any]) -> None:
        """Note tensors that the files lack, or do not need: transformers does not take that for a failure."""
        for kind, words in (
            ("missing_keys", "not in the files, so initialized at random: {} of the model's {} tensors"),
            ("mismatched_keys", "of another shape, so initialized at random: {} of the model's {} tensors"),
            ("unexpected_keys", "not in the model, so not loaded: {} of the files' tensors"),
        ):
            # Of one that does not match, its shapes follow the name.
            if names := sorted(key if isinstance(key, str) else key[0] for key in found.get(kind) or ()):
                count = words.format(len(names), len(self.model.state_dict()))
                self.reporter.send("note", text=f"{count}, such as {names[0][:200]}")

    def _synchronize(self) -> None:  # the device works behind the clock's back
        for gpu in self._gpus():
            self.torch.cuda.synchronize(gpu)

    def _tokens(self, ids: Any) -> list[int]:
        """Return the tokens that the model gives; where it gives fewer, or none, a note says why."""
        tokens: list[int] = []
        try:
            with self.torch.inference_mode():
                self._generate(ids, tokens)
        except Exception as error:
            if _lacks_memory(error):
                raise
            # Which input it wants is the model's own affair: the load itself went well.
            wanted = getattr(self.model, "main_input_name", "input_ids")
            why = "" if wanted == "input_ids" else f" (the model takes {wanted}, not text alone)"
            self.reporter.send("note", text=f"forward pass failed, the load did not: {_one_line(error)}{why}")
        return tokens

    def _generate(self, ids: Any, tokens: list[int]) -> None:
        """Run the first forward pass, which includes work that the load deferred, then greedy steps."""
        wanted, generates = self.job["generate"], self._generates()
        place = getattr(self.model, "device", None)
        # Weights offloaded to the disk are on no device until they are used, and inputs follow them.
        device = "cpu" if place is None or place.type == "meta" else place
        if generates and self.job["generation"]:
            self._generate_with(self.job["generation"], ids.to(device), tokens)
            return
        inputs, prompt = {"input_ids": ids.to(device)}, "input_ids"
        config = getattr(self.model, "config", self.config)
        if getattr(config, "is_encoder_decoder", False):
            prompt, start = "decoder_input_ids", getattr(config, "decoder_start_token_id", None) or 0
            inputs[prompt] = self.torch.tensor([[start]], device=device)
        takes = inspect.signature(self.model.forward).parameters
        cached = {"use_cache": True} if generates and "use_cache" in takes else {}
        with self.reporter.phase("first token"):
            output = self.model(**inputs, **cached)
            self._collect(output, tokens if generates else None)
        if generates and wanted > 1 and getattr(output, "past_key_values", None) is not None:
            encoded = getattr(output, "encoder_last_hidden_state", None)
            kept = cached if encoded is None else {**cached, "encoder_outputs": (encoded,)}
            with self.reporter.phase("further tokens"):
                while len(tokens) < wanted:
                    last = self.torch.tensor([[tokens[-1]]], device=device)
                    output = self.model(**{prompt: last}, past_key_values=output.past_key_values, **kept)
                    self._collect(output, tokens)
        if wanted > max(1, len(tokens)):
            why = "only a language model that returns past_key_values can continue"
            self.reporter.send("note", text=f"{len(tokens)} of {wanted} tokens generated: {why}")

    def _generate_with(self, arguments: dict[str, Any], ids: Any, tokens: list[int]) -> None:
        """Have the model's own `generate` make all tokens; a pass may give it several."""
        how = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0, **arguments}
        with ExitStack() as phase:
            phase.enter_context(self.reporter.phase("first token"))
            streamer = _Streamer(tokens, self.job["generate"], self.reporter, phase)
            self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), streamer=streamer,
                max_new_tokens=self.job["generate"], **how,
            )  # fmt: skip

    def _generates(self) -> bool:
        """Whether the model gives token after token: its class's name says so, or transformers does."""
        name = type(self.model).__name__
        if name.endswith("ForCausalLM"):
            return True
        # transformers before 4.45 says so of masked models too.
        able = getattr(self.model, "can_generate", lambda: False)
        return "Masked" not in name and bool(self._noted("whether it generates is unknown", able, False))

    def _collect(self, output: Any, tokens: list[int] | None) -> None:
        """Append the likeliest token, if tokens are wanted; asking for it also waits for the device."""
        if tokens is not None:
            logits = output.logits if hasattr(output, "logits") else output[0]
            tokens.append(int(logits[0, -1].argmax()))
        self._synchronize()


class _Streamer:
    """Takes from `generate` the prompt, and then what each pass gave; the phase of the first ends with it."""

    def __init__(self, tokens: list[int], wanted: int, reporter: Reporter, phase: ExitStack) -> None:
        self._tokens, self._wanted, self._reporter, self._phase = tokens, wanted, reporter, phase
        self._puts = 0

    def put(self, value: Any) -> None:
        if self._puts:
            self._tokens += value.reshape(-1).tolist()
        if self._puts == 1:
            self._phase.close()
            self._reporter.send("first", tokens=len(self._tokens))
            if len(self._tokens) < self._wanted:
                self._phase.enter_context(self._reporter.phase("further tokens"))
        self._puts += 1

    def end(self) -> None:
        pass


def _start_reading(job: dict[str, Any]) -> Any:
    """Prefetch as `load_model` does it, with the very same code; return what the load is to be done in."""
    ahead = job["prefetch"]
    if when := ahead.get("into_memory"):
        checkpoint = _shardkit("checkpoint.checkpoint").Checkpoint.open(job["folder"])
        weights = _shardkit("load.into_memory").WeightsInMemory(checkpoint, is_ahead=when == "ahead")
        return weights.in_transformers()
    if ahead:
        path = os.path.join(PACKAGE, "load", "prefetch.py")
        runpy.run_path(path)["prefetch"](ahead["files"], ahead["limit_bytes"])
    return nullcontext()


def _shardkit(module: str) -> Any:
    sys.path.append(os.path.dirname(PACKAGE))
    return importlib.import_module(f"shardkit.{module}")


def _with_parts(config: Any) -> list[Any]:
    """Return a config and those of the parts of a composite model, such as its text and vision towers."""
    if not hasattr(config, "model_type"):
        return []
    return [config, *(part for value in vars(config).values() for part in _with_parts(value))]


def _one_line(error: BaseException) -> str:
    line = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return line.encode("utf-8", "replace").decode()  # file names may hold what is no text


def _lacks_memory(error: BaseException) -> bool:
    # torch has an error of its own for a GPU, and for the CPU only words.
    out = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return out or "can't allocate memory" in str(error) or "Cannot allocate memory" in str(error)


def main() -> int:
    """Do the job; 0 when it was done, 1 when it failed and the events say why."""
    with open(sys.argv[-1], encoding="utf-8") as file:
        job = json.load(file)
    for name in ("options", "generation"):
        job[name] = ast.literal_eval(job[name])
    # Run by path, Python puts this folder first: its file names must not shadow anybody's modules.
    here = os.path.join(PACKAGE, "measure")
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]
    reporter = Reporter(job["results"])
    reporter.send("hello", pid=os.getpid())
    try:
        Load(job, reporter).run()
    except Exception as error:
        traceback.print_exc()
        reporter.send("error", reason=_one_line(error))
        return 1
    reporter.send("done")
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is reported; tearing down a large model's threads and mappings would only cost time.
    os._exit(status)
