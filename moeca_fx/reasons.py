"""Every reason for which a model is refused: a closed list, with what each means and what to do about it.

    UnprovenRegionError: blocks.1.mlp.experts: ... expert 2 enters the sum with 1.0100 times its routing weight
    error.code == "weights-off"        Reason(error.code).advice: what to change

Programs read `code`, people the message; `docs/refusals.md` is this list. An error without a code is none of these:
wrong use (a policy, an option, a file), or a defect (`PassError`).
"""

from collections.abc import Iterable
from enum import StrEnum

_UNPROVEN, _UNSUPPORTED, _CAPTURE = "UnprovenRegionError", "UnsupportedModelError", "CaptureError"
_ENTRY = "register an entry that says what the layer computes (docs/registry.md)"


class Reason(StrEnum):
    """A documented reason; the member is its code. Of several that hold for one layer the first listed tells most.

    Attributes:
        error: class of the error that carries it.
        meaning: what was found.
        advice: what to do.
    """

    error: str
    meaning: str
    advice: str

    def __new__(cls, code: str, error: str, meaning: str, advice: str) -> "Reason":  # noqa: D102
        member = str.__new__(cls, code)
        member._value_ = code
        member.error, member.meaning, member.advice = error, meaning, advice
        return member

    # -- registered entries ----------------------------------------------------------------------------------------
    ENTRY_UNPROVEN = (
        "entry-unproven",
        _UNPROVEN,
        "a registered entry does not compute what its module computes",
        "correct the entry's route, experts or finish; the message says by how much the results differ, or which "
        "expert is off",
    )
    ENTRY_FAILED = (
        "entry-failed",
        _UNPROVEN,
        "a function of a registered entry raised an error, or returned something of another kind",
        "correct the function that the message names (docs/registry.md says what each takes and returns)",
    )
    ENTRIES_CLASH = (
        "entries-clash",
        "ConfigError",
        "two registered entries match one module, or modules inside of one another",
        "unregister one of them, or narrow its match",
    )

    # -- a region that could not be proven -------------------------------------------------------------------------
    EXPERTS_DID_NOT_RUN = (
        "experts-did-not-run",
        _UNPROVEN,
        "the example inputs reach too few experts",
        "pass example inputs with more samples or tokens, such as a real step has",
    )
    CALLED_AGAIN = (
        "called-again",
        _UNPROVEN,
        "a layer runs more than once in one forward",
        "give each call a module of its own (they may share their parameters)",
    )
    NOT_FINITE = (
        "not-finite",
        _UNPROVEN,
        "weights or inputs give NaN or infinity",
        "load trained weights, or pass inputs of the scale that the model was made for",
    )
    WEIGHTS_OFF = (
        "weights-off",
        _UNPROVEN,
        "an expert enters the sum with another weight than the router gives it",
        "move the factor into the routing weights or into the expert, or " + _ENTRY,
    )
    REPLAY_DIFFERS = (
        "replay-differs",
        _UNPROVEN,
        "a layer computes something else on other data than on the example",
        "remove what branches on values around the experts, or " + _ENTRY,
    )
    REPLAY_FAILS = (
        "replay-fails",
        _UNPROVEN,
        "what was recorded of a layer does not run on other data or another batch size",
        "move the loop over experts into a method of rows, expert ids and weights, or " + _ENTRY,
    )
    NOT_A_WEIGHTED_SUM = (
        "not-a-weighted-sum",
        _UNPROVEN,
        "a dispatching method does not return the weighted sum of its experts",
        "add biases, scales and shared experts outside of that method, or " + _ENTRY,
    )
    NOT_BY_ROWS = (
        "not-by-rows",
        _UNPROVEN,
        "an expert needs more than its token rows",
        "give experts rows alone: compute what depends on a condition before or after them",
    )
    FREE_EXPERTS_CHOOSE = (
        "free-experts-choose",
        _UNPROVEN,
        "experts choose their tokens, and some of them have no parameters",
        "give every expert parameters, or let tokens choose",
    )
    STACKED_FORM = (
        "stacked-form",
        _UNPROVEN,
        "parameters stack experts, and no known formula of an expert fits what they compute",
        _ENTRY,
    )
    DEPENDS_ON_DATA = (
        "depends-on-data",
        _UNPROVEN,
        "Python around the experts reads data",
        "keep `.item()`, `nonzero` and numpy inside of the loop over experts, or in a method of rows, ids and weights",
    )
    DEPENDS_ON_THE_BATCH = (
        "depends-on-the-batch",
        _UNPROVEN,
        "code around the experts depends on the batch size in another way than in proportion",
        "replace loops over samples by tensor operations, and sizes that are rounded or capped by ones that are not",
    )
    ONE_BATCH_SIZE = (
        "one-batch-size",
        _UNPROVEN,
        "the model does not run on twice the samples",
        "let every tensor input have the batch as its leading size, and fix no batch size in the model",
    )
    WRITES = (
        "writes",
        _UNPROVEN,
        "code around the experts writes into arguments, weights or views",
        "compute a new tensor instead of writing in place",
    )
    OPERANDS = (
        "operands",
        _UNPROVEN,
        "an operation around the experts takes, or a module returns, what no graph can hold",
        "pass tensors and plain numbers between the modules of the layer",
    )
    RESULT = (
        "result",
        _UNPROVEN,
        "a dispatching method does not return one tensor",
        "return the routed rows alone from the method that loops over experts",
    )
    ROLES_UNKNOWN = (
        "roles-unknown",
        _UNPROVEN,
        "a dispatching method has no arguments that are token rows, expert ids and weights",
        "pass rows [N, H], ids [N, k] and weights [N, k], or " + _ENTRY,
    )
    ROUTING_UNKNOWN = (
        "routing-unknown",
        _UNPROVEN,
        "no values of the layer's run are token rows, a routing, and the weighted sum of the experts",
        "move the loop over experts into a method of rows, ids and weights, or " + _ENTRY,
    )
    NO_DISPATCH = (
        "no-dispatch",
        _UNPROVEN,
        "the experts are called from no common method or module of the model",
        "call them from one module, whose forward routes and dispatches",
    )

    # -- no region at all ------------------------------------------------------------------------------------------
    NO_EXPERTS = (
        "no-experts",
        "NoMoEFoundError",
        "there is no list of identical experts under a top-k router",
        "for a dense model use another cache; experts that are held in another way need an entry (docs/registry.md)",
    )
    NO_ROUTER = (
        "no-router",
        "NoMoEFoundError",
        "identical modules ran, but no top-k in a module around them",
        "nothing, if they are no experts; else " + _ENTRY,
    )
    EVERY_TOKEN = (
        "every-token",
        "NoMoEFoundError",
        "each of several identical modules runs on every token",
        "nothing: they are branches of a dense layer",
    )
    LIST_OF_BLOCKS = (
        "list-of-blocks",
        "NoMoEFoundError",
        "identical modules are the model's blocks: other candidates are inside of them",
        "nothing",
    )

    # -- what no cache can serve -----------------------------------------------------------------------------------
    NOT_A_MODULE = (
        "not-a-module",
        _UNSUPPORTED,
        "something other than a torch module was passed",
        "pass the denoiser, not the pipeline",
    )
    TRANSFORMED = (
        "transformed",
        _UNSUPPORTED,
        "the model is transformed already",
        "pass the original, with any policy",
    )
    ADAPTERS = (
        "adapters",
        _UNPROVEN,
        "an adapter (LoRA through peft) is in some experts of a layer and not in others",
        "merge it, `merge_and_unload()` or `pipe.fuse_lora()`, or give every expert one",
    )
    AUTOCAST = (
        "autocast",
        _UNPROVEN,
        "experts run under an autocast that the model enters or leaves itself, or are others under that of a call",
        "enter autocast around `transform` and the calls, not in the model",
    )
    PATCHED = (
        "patched",
        _UNSUPPORTED,
        "forward was replaced on an instance",
        "undo what did it (offloading, compilation, a patch), and apply it afterwards",
    )
    MADE_FOR_INFERENCE = (
        "made-for-inference",
        _UNSUPPORTED,
        "the model was made inside torch.inference_mode",
        "load it outside of the block; calls inside are welcome",
    )
    TRAINING = ("training", _UNSUPPORTED, "a module is in training mode", "call `model.eval()` first")
    HOOKED = ("hooked", _UNSUPPORTED, "a module has hooks", "remove them, or the tool that added them")
    QUANTISED = ("quantised", _UNSUPPORTED, "weights are quantised", "transform the unquantised model")
    INPUTS = (
        "inputs",
        "InputError",
        "the example inputs do not fit the model",
        "pass what one sampling step passes: shapes, dtypes, finite values",
    )
    MIXES_SAMPLES = (
        "mixes-samples",
        _UNSUPPORTED,
        "what the model computes for a sample depends on the other samples of the batch",
        "route over the tokens of each sample alone: capacity, top-k and normalisation too",
    )
    RANDOM = (
        "random",
        _UNSUPPORTED,
        "the model draws random numbers in eval mode",
        "draw them `if self.training` only",
    )
    STATE = (
        "state",
        _UNSUPPORTED,
        "forward writes buffers, parameters or numbers of the model",
        "write them in training mode only",
    )
    LANGUAGE_MODEL = (
        "language-model",
        _UNSUPPORTED,
        "a causal language model: token ids in, no position sees later ones",
        "use a key-value cache",
    )

    # -- tracing and graph passes ----------------------------------------------------------------------------------
    NOT_TRACEABLE = (
        "not-traceable",
        _CAPTURE,
        "torch.export cannot follow the Python of the model outside of its experts",
        "replace what reads data (`.item()`, `if tensor`) by tensor operations, or compute it before the model",
    )
    TRACE_DIFFERS = (
        "trace-differs",
        _CAPTURE,
        "the trace does not give what the model gives",
        "remove state, dropout and Python that depends on data",
    )
    NO_RESIDUAL = (
        "no-residual",
        _UNSUPPORTED,
        "the experts' result is not added to a stream of tokens",
        "write the block as `x + gate * moe(x)` over [B, T, H]",
    )
    MIXES_TOKENS = (
        "mixes-tokens",
        _UNSUPPORTED,
        "what the experts read is not computed token by token, or not in the order of the samples",
        "move what mixes tokens out of the block with the experts",
    )
    EXPERTS_DIFFER = (
        "experts-differ",
        _UNSUPPORTED,
        "experts differ in more than the values of their parameters",
        "make constants and buffers of the experts parameters",
    )
    EXPERT_MIXES_ROWS = (
        "expert-mixes-rows",
        _UNSUPPORTED,
        "an expert looks at several rows at once",
        "normalise and mix outside of the experts",
    )
    EXPERT_OPERATION = (
        "expert-operation",
        _UNSUPPORTED,
        "an expert uses a parameter in a way that has no grouped form",
        "write it with linear, matmul, norms and element-wise products by vectors",
    )
    SLOTS_OF_TWO_SHAPES = (
        "slots-of-two-shapes",
        _UNSUPPORTED,
        "slots may be empty, and expert ids and weights have different shapes",
        "reshape one of them before the experts",
    )
    NOT_COPYABLE = (
        "not-copyable",
        _UNSUPPORTED,
        "the model cannot be copied, or has attributes by the names that a transformed model needs",
        "remove locks and open files from it, or rename the attributes that the message names",
    )
    TIMESTEP = (
        "timestep",
        "InputError",
        "it cannot be told which input is the timestep",
        'name it: `transform(..., timestep="t")`; sessions need none (`timestep=ANNOUNCED`)',
    )
    POLICY = (
        "policy",
        _UNSUPPORTED,
        "the chosen policy needs what this model does not have",
        "choose the policy that the message names",
    )

    @classmethod
    def most_telling(cls, codes: Iterable["Reason | None"]) -> "Reason | None":
        """The first listed of these; None when there is none."""
        given = {code for code in codes if code is not None}
        return next((reason for reason in cls if reason in given), None)
