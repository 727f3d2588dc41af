"""The server's decisions: who is in a step, when it starts, what is averaged. Pure: no sockets, no clock, no torch."""

from .codec_policy import CodecPolicy
from .deadline import Deadline
from .early_stopping import EarlyStopping
from .events import (
    Action,
    Aggregate,
    Backward,
    Checkpoint,
    Evaluate,
    FinishRun,
    FinishStep,
    Forward,
    KeepHeldOutLoss,
    KeepJudgement,
    Reply,
    Report,
    SaveCodecState,
    Train,
)
from .federation import Federation, Phase
from .member import Member, Presence
from .message_rules import ModelLimits
from .roster import NameInUse
from .run_status import RunStatus
from .step import Aggregated, StepRecord, Trained

__all__ = [
    "Action",
    "Aggregate",
    "Aggregated",
    "Backward",
    "Checkpoint",
    "CodecPolicy",
    "Deadline",
    "EarlyStopping",
    "Evaluate",
    "Federation",
    "FinishRun",
    "FinishStep",
    "Forward",
    "KeepHeldOutLoss",
    "KeepJudgement",
    "Member",
    "ModelLimits",
    "NameInUse",
    "Phase",
    "Presence",
    "Reply",
    "Report",
    "RunStatus",
    "SaveCodecState",
    "StepRecord",
    "Train",
    "Trained",
]
