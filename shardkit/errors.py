"""What shardkit raises, in one place to import it from."""

from shardkit.base.errors import (
    Cancelled,
    CastError,
    CheckpointError,
    DestinationError,
    DownloadNeededError,
    Interrupted,
    MeasurementError,
    MissingPackageError,
    PlanError,
    ShardkitError,
    SizeError,
    SourceError,
    SpaceError,
    VerificationError,
)

__all__ = [
    "Cancelled",
    "CastError",
    "CheckpointError",
    "DestinationError",
    "DownloadNeededError",
    "Interrupted",
    "MeasurementError",
    "MissingPackageError",
    "PlanError",
    "ShardkitError",
    "SizeError",
    "SourceError",
    "SpaceError",
    "VerificationError",
]
