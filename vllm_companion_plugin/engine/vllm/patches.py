"""All that the plugin changes of what is not its own, in engines: of vLLM, of PyTorch and of Python.

`PATCHES` is the table; docs/patches.md is made of it. What is replaced, is replaced through its row, and tests look
for anything else. Models that the plugin builds or binds are its work, and so are tensors in them: they are no rows.

Every process of vLLM imports this, so it imports neither vLLM nor PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vllm_companion_plugin.engine.vllm.patching import How, Lifetime, Patch

_ENDS = "with the process"
_BY_ITSELF = "by itself"

LOADER = Patch(
    "vllm.model_executor.model_loader:_LOAD_FORMAT_TO_MODEL_LOADER",
    "engine.register",
    How.HOOKED,
    Lifetime.IMPORT,
    reason="`--load-format companion` is known: `register_model_loader` puts the loader there.",
    link="vllm/model_executor/model_loader/__init__.py: register_model_loader",
    undo=_ENDS,
)
TRANSFER = Patch(
    "vllm.distributed.weight_transfer.factory:WeightTransferEngineFactory.register_engine",
    "engine.register",
    How.HOOKED,
    Lifetime.IMPORT,
    reason='`--weight-transfer-config \'{"backend": "companion"}\'` is known.',
    link="vllm/distributed/weight_transfer/factory.py: WeightTransferEngineFactory",
    undo=_ENDS,
)
TRANSFER_OF_TRAINER = Patch(
    "vllm.distributed.weight_transfer.factory:WeightTransferTrainerFactory.register_engine",
    "engine.register",
    How.HOOKED,
    Lifetime.IMPORT,
    reason="The same, of a trainer.",
    link="vllm/distributed/weight_transfer/factory.py: WeightTransferTrainerFactory",
    undo=_ENDS,
)
ENGINE_CONFIG = Patch(
    "vllm.engine.arg_utils:EngineArgs.create_engine_config",
    "engine.vllm.naming",
    How.REPLACED,
    Lifetime.IMPORT,
    reason=(
        "vLLM before 0.28 loads models that are quantized by bitsandbytes with a format of its own, and says nothing;"
        " the plugin says it."
    ),
    link="vllm/engine/arg_utils.py: EngineArgs.create_engine_config (0.27)",
    undo=_ENDS,
)
LOAD_CONFIG = Patch(
    "vllm.engine.arg_utils:EngineArgs.create_load_config",
    "engine.vllm.naming",
    How.REPLACED,
    Lifetime.IMPORT,
    reason=(
        "vLLM completes the options of some load formats by their name, and is given the format that reads the "
        "checkpoint."
    ),
    link="vllm/engine/arg_utils.py: EngineArgs.create_load_config",
    undo=_ENDS,
)
VLLM_CONFIG = Patch(
    "vllm.config.vllm:VllmConfig.__post_init__",
    "engine.vllm.naming",
    How.REPLACED,
    Lifetime.IMPORT,
    reason=(
        "vLLM decides by the name of the load format whether output and input embeddings are tied, and what can read "
        "an object store."
    ),
    link="vllm/config/vllm.py: VllmConfig.__post_init__",
    undo=_ENDS,
)
REQUEST_MEMORY = Patch(
    "vllm.v1.worker.utils:request_memory",
    "engine.vllm.budget",
    How.REPLACED,
    Lifetime.IMPORT,
    reason=(
        "Weights that a companion holds are a part of the engine's share of the device (adr/0005). vLLM 0.32 asks the"
        " loader for their size."
    ),
    link="vllm/v1/worker/gpu_worker.py: Worker.init_device",
    undo=_ENDS,
    before="0.32",
)
REQUEST_MEMORY_OF_WORKER = Patch(
    "vllm.v1.worker.gpu_worker:request_memory",
    "engine.vllm.budget",
    How.REPLACED,
    Lifetime.IMPORT,
    reason="The worker's own name of the function above.",
    link="vllm/v1/worker/gpu_worker.py: Worker.init_device",
    undo=_ENDS,
    before="0.32",
)
SLEEP = Patch(
    "vllm.device_allocator.cumem:CuMemAllocator.sleep",
    "engine.vllm.sleep",
    How.REPLACED,
    Lifetime.MAPPED,
    reason="Mapped weights leave the device when the engine sleeps; nothing happens where none are mapped (adr/0014).",
    link="vllm/device_allocator/sleep_mode_backend.py: CuMemBackend.suspend",
    undo=_ENDS,
    device_type="cuda",
)
WAKE = Patch(
    "vllm.device_allocator.cumem:CuMemAllocator.wake_up",
    "engine.vllm.sleep",
    How.REPLACED,
    Lifetime.MAPPED,
    reason="As above, on the way back.",
    link="vllm/device_allocator/sleep_mode_backend.py: CuMemBackend.resume",
    undo=_ENDS,
    device_type="cuda",
)
SLEEP_OF_WORKER = Patch(
    "vllm.v1.worker.gpu_worker:Worker.sleep",
    "engine.vllm.sleep",
    How.REPLACED,
    Lifetime.MAPPED,
    reason=(
        "vLLM fails at the end of falling asleep if other processes have taken memory meanwhile, and takes the engine "
        "for awake; it sleeps."
    ),
    link="vllm/v1/worker/gpu_worker.py: Worker.sleep",
    undo=_ENDS,
    device_type="cuda",
)
WAKE_OF_WORKER = Patch(
    "vllm.v1.worker.gpu_worker:Worker.wake_up",
    "engine.vllm.sleep",
    How.REPLACED,
    Lifetime.MAPPED,
    reason="vLLM sets the scales of an fp8 KV cache to 1 then; those of the checkpoint come back.",
    link="vllm/v1/worker/gpu_model_runner.py: GPUModelRunner.post_kv_cache_wake_up (0.26)",
    undo=_ENDS,
    device_type="cuda",
)
SLEEP_OF_CPU_WORKER = Patch(
    "vllm.v1.worker.cpu_worker:CPUWorker.sleep",
    "engine.vllm.sleep",
    How.REPLACED,
    Lifetime.MAPPED,
    reason="Mapped weights are unmapped when the engine sleeps; vLLM has no sleep mode of its own on a CPU.",
    link="vllm/v1/worker/cpu_worker.py: CPUWorker.sleep",
    undo=_ENDS,
    device_type="cpu",
)
WAKE_OF_CPU_WORKER = Patch(
    "vllm.v1.worker.cpu_worker:CPUWorker.wake_up",
    "engine.vllm.sleep",
    How.REPLACED,
    Lifetime.MAPPED,
    reason="As above, on the way back.",
    link="vllm/v1/worker/cpu_worker.py: CPUWorker.wake_up",
    undo=_ENDS,
    device_type="cpu",
)
RELOAD = Patch(
    "vllm.v1.worker.gpu_worker:Worker.reload_weights",
    "engine.vllm.writing",
    How.REPLACED,
    Lifetime.MAPPED,
    reason="Shared weights are renewed, or made the engine's own before others are written to them (adr/0014).",
    link="vllm/model_executor/model_loader/reload/inplace.py: reload_weights",
    undo=_ENDS,
)
LIVE_WEIGHTS = Patch(
    "torch.nn:Module.load_weights",
    "engine.vllm.writing",
    How.REPLACED,
    Lifetime.MAPPED,
    reason="Training frameworks call it on the living model: shared weights become the engine's own first (adr/0014).",
    link="vllm/v1/worker/gpu_model_runner.py: GPUModelRunner.get_model",
    undo="with the model",
    each=True,
)
UPDATE = Patch(
    "vllm.v1.worker.gpu_worker:Worker.companion_update",
    "engine.vllm.updating",
    How.ADDED,
    Lifetime.DECIDED,
    reason='`collective_rpc("companion_update")` has the workers map the next generation of their weights.',
    link="vllm/v1/executor/abstract.py: Executor.collective_rpc",
    undo=_ENDS,
)
PREPARE = Patch(
    "vllm.v1.worker.gpu_worker:Worker.companion_prepare",
    "engine.vllm.updating",
    How.ADDED,
    Lifetime.DECIDED,
    reason="The first phase of `companion_update`, for several engines that switch together.",
    link="vllm/v1/executor/abstract.py: Executor.collective_rpc",
    undo=_ENDS,
)
SWITCH = Patch(
    "vllm.v1.worker.gpu_worker:Worker.companion_switch",
    "engine.vllm.updating",
    How.ADDED,
    Lifetime.DECIDED,
    reason="The second phase.",
    link="vllm/v1/executor/abstract.py: Executor.collective_rpc",
    undo=_ENDS,
)
BACK = Patch(
    "vllm.v1.worker.gpu_worker:Worker.companion_back",
    "engine.vllm.updating",
    How.ADDED,
    Lifetime.DECIDED,
    reason="After the second phase, if another engine could not take its part in it.",
    link="vllm/v1/executor/abstract.py: Executor.collective_rpc",
    undo=_ENDS,
)
FORGET = Patch(
    "vllm.v1.worker.gpu_worker:Worker.companion_forget",
    "engine.vllm.updating",
    How.ADDED,
    Lifetime.DECIDED,
    reason="The end of both phases, and of either.",
    link="vllm/v1/executor/abstract.py: Executor.collective_rpc",
    undo=_ENDS,
)
ANSWERS = Patch(
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor.collective_rpc",
    "engine.vllm.answers",
    How.REPLACED,
    Lifetime.EXECUTOR,
    reason=(
        "When one rank refuses an update, or an adapter, the answers of the others are read, too; vLLM takes them for "
        "those to the next call. Updates only of engines with this load format, and only after an error."
    ),
    link="vllm/v1/executor/multiproc_executor.py: MultiprocExecutor.collective_rpc",
    undo=_ENDS,
)
REQUESTS_OF_SERVERS = Patch(
    "vllm.v1.engine.async_llm:AsyncLLM.add_request",
    "engine.vllm.adapters.requests",
    How.REPLACED,
    Lifetime.IMPORT,
    reason="A request of an adapter that a companion holds is bound to one generation of it (adr/0017).",
    link="vllm/v1/core/kv_cache_utils.py: _gen_lora_extra_hash_keys",
    undo=_ENDS,
)
ADAPTERS_OF_SERVERS = Patch(
    "vllm.v1.engine.async_llm:AsyncLLM.add_lora",
    "engine.vllm.adapters.requests",
    How.REPLACED,
    Lifetime.IMPORT,
    reason="As above, of an adapter that is loaded before any request.",
    link="vllm/entrypoints/openai/models/serving.py: OpenAIServingModels.load_lora_adapter",
    undo=_ENDS,
)
REQUESTS = replace(
    REQUESTS_OF_SERVERS, where="vllm.v1.engine.llm_engine:LLMEngine.add_request", reason="As above, without a server."
)
ADAPTERS = replace(
    ADAPTERS_OF_SERVERS, where="vllm.v1.engine.llm_engine:LLMEngine.add_lora", reason="As above, without a server."
)
UNFINISHED = Patch(
    "vllm.v1.engine.output_processor:OutputProcessor.add_request",
    "engine.vllm.adapters.requests",
    How.REPLACED,
    Lifetime.IMPORT,
    reason="An adapter's generation is held as long as vLLM has a request of it that is not finished.",
    link="vllm/v1/engine/output_processor.py: OutputProcessor.process_outputs",
    undo=_ENDS,
)
WORKERS_ADAPTERS = Patch(
    "vllm.lora.worker_manager:WorkerLoRAManager.__init__",
    "engine.vllm.adapters.loading",
    How.REPLACED,
    Lifetime.IMPORT,
    reason="A worker's settings and device are known, by which it finds companions.",
    link="vllm/lora/worker_manager.py: WorkerLoRAManager",
    undo=_ENDS,
)
LOADED_ADAPTERS = Patch(
    "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter",
    "engine.vllm.adapters.loading",
    How.REPLACED,
    Lifetime.IMPORT,
    reason="The path of an adapter that a companion holds names no directory; vLLM is given one that leads to it.",
    link="vllm/lora/utils.py: get_adapter_absolute_path",
    undo=_ENDS,
)
STAGED_ADAPTERS = Patch(
    "vllm.lora.lora_model:LoRAModel.from_lora_tensors",
    "engine.vllm.adapters.loading",
    How.REPLACED,
    Lifetime.IMPORT,
    reason="vLLM casts and page-locks each tensor of an adapter by itself: seconds for 448 of them.",
    link="vllm/lora/lora_model.py: LoRAModel.from_lora_tensors",
    undo=_ENDS,
)
REMOVED_ADAPTERS = Patch(
    "vllm.lora.worker_manager:WorkerLoRAManager.remove_adapter",
    "engine.vllm.adapters.loading",
    How.REPLACED,
    Lifetime.IMPORT,
    reason="What a worker keeps of an adapter, to load it again, goes with it.",
    link="vllm/lora/worker_manager.py: LRUCacheWorkerLoRAManager.add_adapter",
    undo=_ENDS,
)
ADDED_ADAPTERS = Patch(
    "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.add_adapter",
    "engine.vllm.adapters.loading",
    How.REPLACED,
    Lifetime.IMPORT,
    reason=(
        "An adapter of a companion that could be copied to its slot in part only is removed again; vLLM would serve it "
        "so from the next request on."
    ),
    link="vllm/lora/worker_manager.py: LRUCacheWorkerLoRAManager.add_adapter",
    undo=_ENDS,
)
NAMES_OF_MODELS = Patch(
    "vllm.entrypoints.serve.engine.serving:BaseServing._check_model",
    "engine.vllm.adapters.serving",
    How.REPLACED,
    Lifetime.IMPORT,
    reason=(
        "Over HTTP an adapter that a companion holds is a model of its name. vLLM asks resolvers for names only where "
        "clients may load adapters from any path, and once for each name."
    ),
    link="vllm/entrypoints/openai/models/serving.py: OpenAIServingModels.resolve_lora",
    undo=_ENDS,
)
NAMES_OF_POOLING_MODELS = replace(
    NAMES_OF_MODELS,
    where="vllm.entrypoints.pooling.base.serving:PoolingBaseServing._check_model",
    reason="As above, of embeddings and the like.",
)
KINDS_OF_MESSAGES = Patch(
    "vllm.entrypoints.serve.engine.serving:BaseServing._get_message_types",
    "engine.vllm.adapters.serving",
    How.REPLACED,
    Lifetime.IMPORT,
    reason=(
        "An adapter that is called like a kind of content (`text`, `image`) would answer all chats with such content: "
        "vLLM finds adapters for pictures and sounds by their names."
    ),
    link="vllm/entrypoints/serve/engine/serving.py: BaseServing._get_active_default_mm_loras",
    undo=_ENDS,
)
SOURCE_FILES = Patch(
    "importlib.machinery:SourceFileLoader.exec_module",
    "engine.vllm.imports",
    How.REPLACED,
    Lifetime.LOAD,
    reason=(
        "Constants of modules that a model imports while it is loaded are none of its tensors. Otherwise it does what"
        " it did; `trust_remote_code` imports without any finder, so no finder would do."
    ),
    link="transformers/dynamic_module_utils.py: get_class_in_module",
    undo=f"{_ENDS}; it calls the original and nothing else while no model is loaded",
)
COMPILED_FILES = Patch(
    "importlib.machinery:SourcelessFileLoader.exec_module",
    "engine.vllm.imports",
    How.REPLACED,
    Lifetime.LOAD,
    reason="As above, for modules without source.",
    link="transformers/dynamic_module_utils.py: get_class_in_module",
    undo=f"{_ENDS}; it calls the original and nothing else while no model is loaded",
)
OPENED_FILES = Patch(
    "sys:addaudithook",
    "engine.identity.reading",
    How.HOOKED,
    Lifetime.LOAD,
    reason="Which files a model is made from is known only by what is opened meanwhile (adr/0011).",
    link="transformers/configuration_utils.py: PretrainedConfig.from_pretrained",
    undo=f"{_ENDS}, as Python removes no audit hook; it returns at once while no model is loaded",
)
BUDGET = Patch(
    "vllm.v1.worker.gpu_worker:Worker.requested_memory",
    "engine.vllm.budget",
    How.SET,
    Lifetime.ONCE,
    reason=(
        "An engine whose attach failed has its memory back, and one that maps a draft which was published too late to"
        " be announced sets it aside. The loader finds the worker among its callers (adr/0005)."
    ),
    link="vllm/v1/worker/gpu_worker.py: Worker.determine_available_memory",
    undo="with the worker",
    each=True,
)
AFTER_FORK = Patch(
    "os:register_at_fork",
    "client.mirror",
    How.HOOKED,
    Lifetime.LOADERS,
    reason="A forked child hands nothing back: what it has is its parent's.",
    link="Python's os.register_at_fork",
    undo=_ENDS,
)
AFTER_FORK_OF_CALLS = Patch(
    "os:register_at_fork",
    "wire.signals",
    How.HOOKED,
    Lifetime.LOADERS,
    reason="Threads that talk to gRPC for the main thread do not come along.",
    link="Python's os.register_at_fork",
    undo=_ENDS,
)
AT_EXIT = Patch(
    "atexit:register",
    "client.lease",
    How.HOOKED,
    Lifetime.LOADERS,
    reason="Leases end before gRPC does.",
    link="Python's atexit.register",
    undo=_ENDS,
)
FINDERS = Patch(
    "sys:meta_path",
    "engine.vllm.imports",
    How.HOOKED,
    Lifetime.WAITING,
    reason=(
        "What concerns a module of vLLM is done when vLLM imports it: `register()` imports nothing, as it runs in "
        "every process of vLLM."
    ),
    link="vllm/plugins/__init__.py: load_general_plugins",
    undo=_BY_ITSELF,
)
LOAD_FORMAT_OF_ARGUMENTS = Patch(
    "vllm.engine.arg_utils:EngineArgs.load_format",
    "engine.vllm.naming",
    How.SET,
    Lifetime.CONFIGURING,
    reason="As of `create_load_config`, and of `create_engine_config`, which may be called again.",
    link="vllm/engine/arg_utils.py: EngineArgs.create_load_config",
    undo="when the call returns",
    each=True,
)
OPTIONS_OF_ARGUMENTS = Patch(
    "vllm.engine.arg_utils:EngineArgs.model_loader_extra_config",
    "engine.vllm.naming",
    How.SET,
    Lifetime.CONFIGURING,
    reason="As of `create_load_config`.",
    link="vllm/engine/arg_utils.py: EngineArgs.create_load_config",
    undo="when the call returns",
    each=True,
)
LOAD_FORMAT = Patch(
    "vllm.config.load:LoadConfig.load_format",
    "engine.vllm.naming",
    How.SET,
    Lifetime.DECIDING,
    reason="vLLM sees the format that reads the checkpoint.",
    link="vllm/config/vllm.py: VllmConfig.try_verify_and_update_config",
    undo="when vLLM has decided, or the model is loaded",
    each=True,
)
OPTIONS = Patch(
    "vllm.config.load:LoadConfig.model_loader_extra_config",
    "engine.vllm.naming",
    How.SET,
    Lifetime.DECIDING,
    reason="That format's own options.",
    link="vllm/config/vllm.py: VllmConfig.try_verify_and_update_config",
    undo="when vLLM has decided, or the model is loaded; a format that vLLM put there stays as `source_format`",
    each=True,
)
NOTES_FOR_RELOADS = Patch(
    "vllm.model_executor.model_loader.utils:record_metadata_for_reloading",
    "engine.vllm.building",
    How.REPLACED,
    Lifetime.BUILDING,
    reason="Noting parameters for a later reload took a third of the time of building, and counted as using them.",
    link="vllm/model_executor/model_loader/utils.py: initialize_model",
    undo="when the model is built",
)
WHAT_IS_LEFT = Patch(
    "vllm.model_executor.model_loader.reload.layerwise:_place_kernel_tensors",
    "engine.vllm.reload_notes",
    How.REPLACED,
    Lifetime.UPDATING,
    reason="A parameter into which vLLM loads nothing has anything then, and vLLM goes on: such an update is an error.",
    link="vllm/model_executor/model_loader/reload/layerwise.py: finalize_layerwise_processing",
    undo="when the weights are loaded",
)
LAYERS = Patch(
    "vllm.config.compilation:CompilationConfig.static_forward_context",
    "engine.vllm.building",
    How.SET,
    Lifetime.BUILDING,
    reason="Layers register themselves when they are built, and a second time is an error.",
    link="vllm/model_executor/layers/attention/attention.py: Attention.__init__",
    undo="its items are put back if the build fails; after a second model of `vllm-companion verify`",
    each=True,
)
MOE_LAYERS = Patch(
    "vllm.config.compilation:CompilationConfig.static_all_moe_layers",
    "engine.vllm.building",
    How.SET,
    Lifetime.BUILDING,
    reason="As above.",
    link="vllm/model_executor/layers/fused_moe/runner/moe_runner.py (0.32)",
    undo="its items are put back if the build fails; after a second model of `vllm-companion verify`",
    each=True,
)
ROPES = Patch(
    "vllm.model_executor.layers.rotary_embedding:_ROPE_DICT",
    "engine.vllm.building",
    How.SET,
    Lifetime.BUILDING,
    reason="A build that failed leaves no rope modules for the next one.",
    link="vllm/model_executor/layers/rotary_embedding/__init__.py: get_rope",
    undo="only items that the failed build added are removed",
)
ALLOCATIONS = Patch(
    "torch.overrides:TorchFunctionMode",
    "tree.building",
    How.HOOKED,
    Lifetime.BUILDING,
    reason="Memory for weights is not asked for.",
    link="torch/overrides.py: TorchFunctionMode",
    undo="when the model is built",
)
PARAMETERS = Patch(
    "torch.nn.modules.module:register_module_parameter_registration_hook",
    "tree.building",
    How.HOOKED,
    Lifetime.BUILDING,
    reason="A large parameter that has values gives them up at once, unless it is the engine's own.",
    link="torch/nn/modules/module.py: register_module_parameter_registration_hook",
    undo="when the model is built",
)
OPERATIONS = Patch(
    "torch.utils._python_dispatch:TorchDispatchMode",
    "tree.operators",
    How.HOOKED,
    Lifetime.LOADING,
    reason="It is known of every tensor what wrote to it (adr/0012).",
    link="torch/utils/_python_dispatch.py: TorchDispatchMode",
    undo="when the model is loaded",
)
LOOKS = Patch(
    "torch.overrides:TorchFunctionMode",
    "tree.operators",
    How.HOOKED,
    Lifetime.LOADING,
    reason="It is known whether post-processing gives data of a tensor to Python past all operators.",
    link="torch/overrides.py: TorchFunctionMode",
    undo="when the module was processed",
)
REHEARSAL = Patch(
    "torch.utils._python_dispatch:TorchDispatchMode",
    "engine.vllm.rehearsal",
    How.HOOKED,
    Lifetime.REHEARSING,
    reason="It is known which parameters a model's own code writes, past the loaders that vLLM's reload repeats.",
    link="vllm/model_executor/model_loader/reload/layerwise.py: initialize_layerwise_reload",
    undo="when loading was rehearsed",
)
CLOCK = Patch(
    "time:perf_counter",
    "engine.vllm.clocks",
    How.REPLACED,
    Lifetime.LOADING,
    reason="What loading measures by a clock and leaves in a model is none of the model's values.",
    link="vllm/model_executor/model_loader/utils.py: online_quantization_timing_context",
    undo="when the model is loaded",
)
CLOCK_TIME = replace(CLOCK, where="time:time", reason="As above.")
CLOCK_MONOTONIC = replace(CLOCK, where="time:monotonic", reason="As above.")
CLOCK_PROCESS = replace(CLOCK, where="time:process_time", reason="As above.")
CLOCK_NS = replace(CLOCK, where="time:perf_counter_ns", reason="As above.")
CLOCK_TIME_NS = replace(CLOCK, where="time:time_ns", reason="As above.")
CLOCK_MONOTONIC_NS = replace(CLOCK, where="time:monotonic_ns", reason="As above.")
LOADERS_WEIGHTS = Patch(
    "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_weights",
    "engine.publish",
    How.REPLACED,
    Lifetime.LOADING,
    reason="It is known when the model is built, and when it is loaded and not yet processed.",
    link="vllm/model_executor/model_loader/base_loader.py: BaseModelLoader.load_model",
    undo="when the model is loaded",
    each=True,
)
MODELS_WEIGHTS = Patch(
    "torch.nn:Module.load_weights",
    "engine.publish",
    How.REPLACED,
    Lifetime.LOADING,
    reason="Tensors of the checkpoint are counted as they come, for progress.",
    link="vllm/model_executor/model_loader/default_loader.py: DefaultModelLoader.load_weights",
    undo="when the weights are read",
    each=True,
)
REVISION = Patch(
    "vllm.config.model:ModelConfig.revision",
    "engine.identity.checkpoint",
    How.SET,
    Lifetime.LOADING,
    reason="vLLM reads the snapshot that the key names, wherever the branch has moved since.",
    link="vllm/model_executor/model_loader/weight_utils.py: download_weights_from_hf",
    undo="when the model is loaded",
    each=True,
)
PROCESSING = Patch(
    "vllm.model_executor.layers.quantization.base_config:QuantizeMethodBase.process_weights_after_loading",
    "engine.vllm.processing",
    How.REPLACED,
    Lifetime.PROCESSING,
    reason="It is known which module is processed; what is shared stands aside meanwhile (adr/0003, adr/0004).",
    link="vllm/model_executor/model_loader/utils.py: process_weights_after_loading",
    undo="when the model is processed",
    each=True,
)
MODULES_PROCESSING = Patch(
    "torch.nn:Module.process_weights_after_loading",
    "engine.vllm.processing",
    How.REPLACED,
    Lifetime.PROCESSING,
    reason="As above, of modules that process themselves by code that is not vLLM's.",
    link="vllm/model_executor/model_loader/utils.py: process_weights_after_loading",
    undo="when the model is processed",
    each=True,
)
LAYERS_TO_LOAD = Patch(
    "vllm.model_executor.model_loader.reload.layerwise:LAYERWISE_INFO",
    "engine.vllm.processing",
    How.SET,
    Lifetime.PROCESSING,
    reason=(
        "Modules that are quantized while they are loaded have loaders of their own until then, and an attached one "
        "is never loaded."
    ),
    link="vllm/model_executor/model_loader/reload/layerwise.py: initialize_online_processing",
    undo="as loading itself would have done",
)
WEIGHT_LOADERS = Patch(
    "torch:Tensor.weight_loader",
    "engine.vllm.processing",
    How.SET,
    Lifetime.PROCESSING,
    reason="As above: each has its original loader again.",
    link="vllm/model_executor/model_loader/reload/layerwise.py: initialize_online_processing",
    undo="as loading itself would have done",
    each=True,
)
WARNINGS = Patch(
    "warnings:simplefilter",
    "tree.states",
    How.HOOKED,
    Lifetime.LOADING,
    reason="Python warns that it will not tell the state of its iterators any more, which is asked for here.",
    link="Python's warnings.catch_warnings",
    undo="at once",
)
COLLECTOR = Patch(
    "gc:disable",
    "core.process",
    How.HOOKED,
    Lifetime.WORKING,
    reason="A full collection walks all of vLLM's objects, in the middle of milliseconds of work.",
    link="Python's gc.disable",
    undo="when it is done",
)
FREEZING = Patch(
    "gc:freeze",
    "core.process",
    How.HOOKED,
    Lifetime.STARTING,
    reason="vLLM collects about fifteen times while an engine starts, each time over all that its imports have made.",
    link="Python's gc.freeze; vllm/v1/engine/core.py freezes, too, when the engine is up",
    undo="by vLLM, which takes all over; after a start that failed, by the first full collection",
)
END_OF_START = Patch(
    "gc:callbacks",
    "core.process",
    How.HOOKED,
    Lifetime.DECIDED,
    reason="A start that failed does not say so.",
    link="Python's gc.callbacks",
    undo=_ENDS,
)
SWITCHES = Patch(
    "sys:setswitchinterval",
    "core.process",
    How.HOOKED,
    Lifetime.WORKING,
    reason="A thread back from the device waits 0.1 ms for the interpreter, not 5.",
    link="Python's sys.setswitchinterval",
    undo="when it is done",
)

STARTS = Patch(
    "threading:Thread.start",
    "engine.vllm.threads",
    How.REPLACED,
    Lifetime.LOADING,
    reason="What a model's code does in a thread that it starts while it is loaded is watched, too.",
    link="torch/overrides.py: TorchFunctionMode",
    undo="when the model is loaded",
)
RUNS = replace(STARTS, where="threading:Thread.run", reason="As above.", undo="when it begins to run", each=True)
TASKS = replace(
    STARTS,
    where="concurrent.futures.thread:ThreadPoolExecutor.submit",
    reason="As above, of a task, whenever its thread was started.",
)
READS_OF_MODEL = Patch(
    "vllm.config.model:ModelConfig.__getattribute__",
    "engine.identity.flag_reads",
    How.REPLACED,
    Lifetime.LOADING,
    reason="The key leaves out limits, and code outside vLLM may load by one: what it reads is noted.",
    link="vllm/config/model.py: ModelConfig",
    undo="when the model is loaded",
)
READS_OF_SCHEDULER = replace(
    READS_OF_MODEL,
    where="vllm.config.scheduler:SchedulerConfig.__getattribute__",
    reason="As above.",
    link="vllm/config/scheduler.py: SchedulerConfig",
)
READS_OF_CACHE = replace(
    READS_OF_MODEL,
    where="vllm.config.cache:CacheConfig.__getattribute__",
    reason="As above.",
    link="vllm/config/cache.py: CacheConfig",
)
READS_OF_LORA = replace(
    READS_OF_MODEL,
    where="vllm.config.lora:LoRAConfig.__getattribute__",
    reason="As above.",
    link="vllm/config/lora.py: LoRAConfig",
)
READS_OF_MULTIMODAL = replace(
    READS_OF_MODEL,
    where="vllm.config.multimodal:MultiModalConfig.__getattribute__",
    reason="As above.",
    link="vllm/config/multimodal.py: MultiModalConfig",
)
READS_OF_POOLER = replace(
    READS_OF_MODEL,
    where="vllm.config.pooler:PoolerConfig.__getattribute__",
    reason="As above.",
    link="vllm/config/pooler.py: PoolerConfig",
)
READS_OF_COMPILATION = replace(
    READS_OF_MODEL,
    where="vllm.config.compilation:CompilationConfig.__getattribute__",
    reason="As above.",
    link="vllm/config/compilation.py: CompilationConfig",
)
READS_OF_PARALLEL = replace(
    READS_OF_MODEL,
    where="vllm.config.parallel:ParallelConfig.__getattribute__",
    reason="As above.",
    link="vllm/config/parallel.py: ParallelConfig",
)
READS_OF_LOAD = replace(
    READS_OF_MODEL,
    where="vllm.config.load:LoadConfig.__getattribute__",
    reason="As above.",
    link="vllm/config/load.py: LoadConfig",
)
READS_OF_SPECULATIVE = replace(
    READS_OF_MODEL,
    where="vllm.config.speculative:SpeculativeConfig.__getattribute__",
    reason="As above.",
    link="vllm/config/speculative.py: SpeculativeConfig",
)
READS_OF_ATTENTION = replace(
    READS_OF_MODEL,
    where="vllm.config.attention:AttentionConfig.__getattribute__",
    reason="As above.",
    link="vllm/config/attention.py: AttentionConfig",
)
READS_OF_KERNEL = replace(
    READS_OF_MODEL,
    where="vllm.config.kernel:KernelConfig.__getattribute__",
    reason="As above.",
    link="vllm/config/kernel.py: KernelConfig",
)
READS_OF_VALUES = Patch(
    "torch.nn:Module.__getattribute__",
    "tree.uses",
    How.REPLACED,
    Lifetime.LOADING,
    reason=(
        "Values that building gave to a model are each engine's own, unless the model's own code loads by one. Only of "
        "models with code outside vLLM."
    ),
    link="torch/nn/modules/module.py: Module",
    undo="when the model is loaded",
)
READS_OF_TENSORS = replace(
    READS_OF_VALUES,
    where="torch:Tensor.__getattribute__",
    reason="As above, of values that building hung on tensors.",
    link="torch/_tensor.py: Tensor",
)

PATCHES: tuple[Patch, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Patch))

CLOCKS = tuple(patch for patch in PATCHES if patch.where.startswith("time:"))
"""Of Python, as modules call them."""
READS = tuple(patch for patch in PATCHES if patch.attribute == "__getattribute__" and patch.where.startswith("vllm."))
"""Of vLLM's configurations."""


def to_markdown() -> str:
    """The tables of docs/patches.md."""
    permanent = _table(patch for patch in PATCHES if patch.lifetime.is_permanent)
    temporary = _table(patch for patch in PATCHES if not patch.lifetime.is_permanent)
    return f"## Until the process ends\n\n{permanent}\n## For a while\n\n{temporary}"


_DEVICES = {"": "", "cuda": ", on a GPU", "cpu": ", on a CPU"}


def _table(patches: Iterator[Patch]) -> str:
    lines = ["| what | vLLM | when | why | because of | undone |", "| --- " * 6 + "|"]
    for patch in patches:
        cells = (
            f"`{patch.target}` {patch.how.value}" + (", on single objects" if patch.each else ""),
            (f"before {patch.before}" if patch.before else "all") + _DEVICES[patch.device_type],
            patch.lifetime.text,
            patch.reason,
            patch.link,
            patch.undo,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
