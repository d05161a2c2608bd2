"""Training runs: from a TOML file to a run folder, interrupted and resumed at will."""

from .config import (
    DataConfig as DataConfig,
    ReportConfig as ReportConfig,
    RunConfig as RunConfig,
    TokenizerConfig as TokenizerConfig,
    TrainingConfig as TrainingConfig,
    load_config as load_config,
    parse_config as parse_config,
)
from .interrupts import Interrupted as Interrupted
from .memory import keep_freed_memory as keep_freed_memory
from .report import closing_report as closing_report
from .run_folder import LoadedRun as LoadedRun, load_run as load_run
from .sources import (
    LoadedModel as LoadedModel,
    convert_model as convert_model,
    load_model as load_model,
)
from .trainer import TrainingResult as TrainingResult, train as train
