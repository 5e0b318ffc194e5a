"""Asynchronous pipeline training: the schedule of staleness, the loop of a stage, and what stages speak through."""

from hf_mlopt.lazy import lazy_names


_PUBLIC = {
    "Channels": "hf_mlopt.pipeline.transport.base",
    "PipelineTrainer": "hf_mlopt.pipeline.trainer",
    "PipelineTrainingArguments": "hf_mlopt.pipeline.arguments",
    "PipelineConfig": "hf_mlopt.pipeline.config",
    "PipelineError": "hf_mlopt.pipeline.transport.base",
    "SynchronousWorker": "hf_mlopt.pipeline.torch_pp",
    "Schedule": "hf_mlopt.pipeline.schedule",
    "Stage": "hf_mlopt.pipeline.stage",
    "Telemetry": "hf_mlopt.pipeline.telemetry",
    "Update": "hf_mlopt.pipeline.updating",
    "Worker": "hf_mlopt.pipeline.worker",
    "balance": "hf_mlopt.pipeline.partition",
    "choose": "hf_mlopt.pipeline.schedule",
    "distributed_channels": "hf_mlopt.pipeline.transport.distributed",
    "local_channels": "hf_mlopt.pipeline.transport.local",
    "memory": "hf_mlopt.pipeline.event_model",
    "parse": "hf_mlopt.pipeline.schedule",
    "layer_costs": "hf_mlopt.pipeline.partition",
    "merged_state_dict": "hf_mlopt.pipeline.partition",
    "run_local": "hf_mlopt.pipeline.transport.local",
    "self_test": "hf_mlopt.pipeline.self_test",
    "split": "hf_mlopt.pipeline.partition",
    "time_per_batch": "hf_mlopt.pipeline.event_model",
}

__all__, __getattr__ = lazy_names(__name__, _PUBLIC)
