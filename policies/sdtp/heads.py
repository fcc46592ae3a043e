"""The learned modules of SDTP: one small network per stage, which scores how salient a token is."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from kvprune.errors import KVPruneError
from kvprune.files import write_text, write_whole

FORMAT = "kvprune.SDTPHeads"

_LEAST = {"first_layer": 0, "query_heads": 0}


class SDTPHeads(
    nn.Module,
    ModelHubMixin,
    library_name="kvprune",
    tags=["token-pruning", "sdtp"],
    license="apache-2.0",
):
    """One network per stage: LayerNorm, then an MLP with GELU, hidden -> hidden/4 -> 2.

    The two outputs are the logits of keeping and of dropping a token; the difference, keep minus
    drop, ranks tokens (paper, section 3.2; the LayerNorm is ours).

    With `query_heads` the prompt's last tokens judge the tokens as well. The paper's head cannot
    do this: in a causal model the hidden state of a token does not know the question that follows
    the token. Each head of this low-rank term makes a key of every token, and a query of each of
    the `query_tokens` newest tokens, with projections that all stages share. The scaled products
    of a token's key with the queries give one feature per head, their log-mean-exp. A stage's
    score is then a weighted sum, over the `window` tokens around a token, of the MLP's scores and
    these features, since the answer to a question stands beside the words that text and question
    have in common.

    Args:
        hidden_size: the hidden size C of the model that the heads are for.
        num_layers: how many decoder layers that model has.
        first_layer: the layer that the first stage stands before, counted from 0.
        every: the number of layers from one stage to the next.
        stages: how many stages; None for as many as the model has room for.
        keep: the share that each stage keeps of the tokens that the stage before it kept, in
            (0, 1].
        query_heads: the number of heads of the low-rank term; 0 for none (the paper's module).
        query_size: the number of features of each of these heads.
        query_tokens: how many of the newest tokens make queries.
        window: how many tokens a score is a weighted sum over, with the scored token in the
            middle; an odd number; of effect with `query_heads` alone.
        fingerprint: the fingerprint of the model that the heads were trained for; see the
            function `fingerprint`.

    Raises:
        KVPruneError: a number out of range, an even window, or more stages than the model has room
            for.
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        first_layer: int = 4,
        every: int = 3,
        stages: int | None = None,
        keep: float = 0.9,
        query_heads: int = 0,
        query_size: int = 32,
        query_tokens: int = 64,
        window: int = 15,
        fingerprint: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        numbers = {
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "first_layer": first_layer,
            "every": every,
            "query_heads": query_heads,
            "query_size": query_size,
            "query_tokens": query_tokens,
            "window": window,
        }
        _check_numbers(numbers)
        check_keep(keep, "SDTPHeads")
        self.layers = _layers(num_layers, first_layer, every, stages)
        self.keep = keep
        self.query_tokens = query_tokens
        self.configuration: dict[str, Any] = {
            **numbers,
            "stages": len(self.layers),
            "keep": keep,
            "fingerprint": fingerprint,
        }
        self.stages = nn.ModuleList(
            _Head(hidden_size, query_heads, query_size, window) for _ in self.layers
        )
        self.asks = _Asks(hidden_size, query_heads, query_size) if query_heads else None
        self._elsewhere: dict[torch.device, tuple[Any, SDTPHeads]] = {}

    def on(self, device: torch.device) -> SDTPHeads:
        """These heads, or a copy on another device, made anew only after a weight changed."""
        if next(self.parameters()).device == device:
            return self
        # Tensors that were made in inference mode have no version counter.
        state = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters()]
        if device not in self._elsewhere or self._elsewhere[device][0] != state:
            # The copy starts without copies of its own.
            twin = copy.deepcopy(self, {id(self._elsewhere): {}})
            self._elsewhere[device] = (state, twin.to(device))
        return self._elsewhere[device][1]

    def forward(self, hidden: Tensor, columns: Tensor, stage: int) -> Tensor:
        """The scores of tokens at a stage: how much the stage wants to keep each token.

        Args:
            hidden: `[B, Q, C]`, the input of the stage's layer, of any dtype, for the tokens that
                are left, in order.
            columns: `[B, Q]` int64, unique in a row, -1 where there is no token.
            stage: the number of the stage, from 0.

        Returns:
            `[B, Q]` in the heads' dtype: the keep-minus-drop logit, or with `query_heads` the
            weighted sum.
        """
        head: Any = self.stages[stage]
        hidden = head.norm(hidden.to(head.norm.weight.dtype))
        score: Tensor = head.own(hidden)
        if self.asks is None:
            return score
        features = torch.cat(
            [score[..., None], self.asks(hidden, columns, self.query_tokens, head.scale)], -1
        )
        # Places without a token must not reach their neighbours through the weighted sum.
        return cast(Tensor, head.smoothed(features.masked_fill((columns < 0)[..., None], 0.0)))

    def save_pretrained(  # type: ignore[override]
        self,
        folder: str | os.PathLike[str],
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> str | None:
        """Writes the weights, the configuration and, if the folder has none yet, a model card.

        Args:
            folder: the folder, which is made if it is not there.
            push_to_hub: whether to push the heads to the hub afterwards.
            repo_id: the repository to push to; by default the folder's name.
            options: further arguments of huggingface_hub's mixin for the push.

        Returns:
            the commit on the hub; None without a push.

        Raises:
            KVPruneError: a file cannot be written; what was there before is unchanged.
        """
        place = Path(folder)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KVPruneError(
                f"SDTPHeads.save_pretrained({str(folder)!r}): expected a folder that can be "
                f"written: {error}"
            ) from error
        # The mixin's own `save_pretrained` is not called: it first removes what was there.
        self._save_pretrained(place)
        if not push_to_hub:
            return None
        said: str = self.push_to_hub(repo_id or place.name, **options)
        return said

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {name: t.contiguous() for name, t in self.state_dict().items()}
        header = {"format": FORMAT, "configuration": json.dumps(self.configuration)}
        write_whole(
            save_directory / SAFETENSORS_SINGLE_FILE,
            lambda scratch: save_file(tensors, scratch, metadata=header),
        )
        write_text(save_directory / CONFIG_NAME, json.dumps(self.configuration, indent=2) + "\n")
        card = save_directory / "README.md"
        if not card.exists():
            write_text(card, str(self.generate_model_card()))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: str | os.PathLike[str], **options: Any
    ) -> SDTPHeads:
        """Reads heads that `save_pretrained` wrote; they are in eval mode.

        Args:
            name: a folder, or a repository on the hub.
            options: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            KVPruneError: no such folder or repository, or one without SDTP heads.
        """
        try:
            heads: SDTPHeads = super().from_pretrained(os.fspath(name), **options)
        # The hub, safetensors and JSON raise errors of many classes.
        except Exception as error:
            raise KVPruneError(
                f"SDTPHeads.from_pretrained({str(name)!r}): expected a folder, or a repository on "
                f"the hub, that SDTPHeads.save_pretrained wrote: {error}"
            ) from error
        return heads

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> SDTPHeads:
        if os.path.isdir(model_id):
            return _read(Path(model_id) / SAFETENSORS_SINGLE_FILE)
        hub = {name: options[name] for name in _HUB if name in options}
        return _read(Path(hf_hub_download(model_id, SAFETENSORS_SINGLE_FILE, **hub)))


_HUB = ("revision", "cache_dir", "force_download", "local_files_only", "token")


class _Head(nn.Module):
    """The modules of one stage that it does not share with the other stages."""

    def __init__(self, hidden_size: int, heads: int, size: int, window: int) -> None:
        super().__init__()
        inner = max(hidden_size // 4, 1)
        self.norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, inner)
        self.down = nn.Linear(inner, 2)
        if heads:
            self.scale = nn.Parameter(torch.ones(heads, size))
            self.smooth = nn.Conv1d(1 + heads, 1, window, padding=window // 2)
            _start(self.smooth, heads, window)

    def own(self, hidden: Tensor) -> Tensor:
        """The paper's score of normalised tokens: `[B, Q, C]` to `[B, Q]`."""
        keep, drop = self.down(F.gelu(self.up(hidden))).unbind(-1)
        score: Tensor = keep - drop
        return score

    def smoothed(self, features: Tensor) -> Tensor:
        """The weighted sum of features over a token's window: `[B, Q, 1 + heads]` to `[B, Q]`."""
        score: Tensor = self.smooth(features.transpose(1, 2))[:, 0]
        return score


def _start(smooth: nn.Conv1d, heads: int, window: int) -> None:
    """Sets the first weights: the MLP's score of the token itself, plus the mean of all features.

    The features are those of the queries; their mean is over heads and window.
    """
    with torch.no_grad():
        smooth.weight.fill_(1.0 / heads / window)
        smooth.weight[0, 0] = 0.0
        smooth.weight[0, 0, window // 2] = 1.0


class _Asks(nn.Module):
    """The low-rank term's projections, which all stages share."""

    def __init__(self, hidden_size: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.key = nn.Linear(hidden_size, heads * size)
        self.query = nn.Linear(hidden_size, heads * size)
        # Keys and queries are alike at first: a token asks for tokens that resemble it.
        nn.init.normal_(self.key.weight, std=hidden_size**-0.5)
        with torch.no_grad():
            self.query.weight.copy_(self.key.weight)
            self.key.bias.zero_()
            self.query.bias.zero_()

    def forward(self, hidden: Tensor, columns: Tensor, count: int, scale: Tensor) -> Tensor:
        """The features `[B, Q, heads]` of tokens `[B, Q, C]` that their `count` newest give."""
        newest = columns.topk(min(count, columns.shape[1]), dim=-1)
        there = newest.values >= 0
        asking = hidden.gather(1, newest.indices[..., None].expand(-1, -1, hidden.shape[-1]))
        keys = self.key(hidden).unflatten(-1, (self.heads, self.size)) * scale
        queries = self.query(asking).unflatten(-1, (self.heads, self.size))
        products = torch.einsum("bnhd,bwhd->bnhw", keys, queries) / self.size**0.5
        products = products.masked_fill(~there[:, None, None, :], -torch.inf)
        return products.logsumexp(-1) - there.sum(-1).clamp(min=1).log()[:, None, None]


def _read(path: Path) -> SDTPHeads:
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if header.get("format") != FORMAT:
        raise KVPruneError(f"its header says format={header.get('format')!r}")
    # On the meta device nothing is initialised, which would draw from the user's random numbers.
    with torch.device("meta"):
        heads = SDTPHeads(**json.loads(header["configuration"]))
    heads.load_state_dict(tensors, assign=True)
    return heads.eval()


def check_keep(keep: Any, who: str) -> None:
    """Refuses a `keep` that is not a share.

    Args:
        keep: a share, a float in (0, 1].
        who: the class that was given it, for the error.

    Raises:
        KVPruneError: not a share.
    """
    if not isinstance(keep, float) or not 0.0 < keep <= 1.0:
        raise KVPruneError(f"{who}: keep={keep!r}: expected a share (a float in (0, 1])")


def _check_numbers(numbers: dict[str, Any]) -> None:
    for name, number in numbers.items():
        least = _LEAST.get(name, 1)
        if type(number) is not int or number < least:
            raise KVPruneError(f"SDTPHeads: {name}={number!r}: expected an int of at least {least}")
    if numbers["window"] % 2 == 0:
        raise KVPruneError(f"SDTPHeads: window={numbers['window']}: expected an odd number")


def _layers(num_layers: int, first_layer: int, every: int, stages: int | None) -> tuple[int, ...]:
    room = range(first_layer, num_layers, every)
    wanted = len(room) if stages is None else stages
    if type(wanted) is not int or not 1 <= wanted <= len(room):
        raise KVPruneError(
            f"SDTPHeads: stages={stages!r}: a model of {num_layers} layers has room for "
            f"{len(room)} (first_layer={first_layer}, every={every}); expected 1 to {len(room)}"
        )
    return tuple(room[:wanted])
