"""What shardkit raises, in one place to import it from."""

from shardkit.base.errors import Cancelled as Cancelled
from shardkit.base.errors import CastError as CastError
from shardkit.base.errors import CheckpointError as CheckpointError
from shardkit.base.errors import DestinationError as DestinationError
from shardkit.base.errors import DownloadNeededError as DownloadNeededError
from shardkit.base.errors import Interrupted as Interrupted
from shardkit.base.errors import MeasurementError as MeasurementError
from shardkit.base.errors import MissingPackageError as MissingPackageError
from shardkit.base.errors import PlanError as PlanError
from shardkit.base.errors import ShardkitError as ShardkitError
from shardkit.base.errors import SizeError as SizeError
from shardkit.base.errors import SourceError as SourceError
from shardkit.base.errors import SpaceError as SpaceError
from shardkit.base.errors import VerificationError as VerificationError

__all__ = [name for name in dir() if name[0].isupper()]  # for help()
