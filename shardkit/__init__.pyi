__version__: str

from .checkpoint import Checkpoint as Checkpoint
from .compare import Comparison as Comparison
from .compare import compare_loads as compare_loads
from .demo import make_demo_checkpoint as make_demo_checkpoint
from .display.progress import ProgressBar as ProgressBar
from .errors import Cancelled as Cancelled
from .errors import CastError as CastError
from .errors import CheckpointError as CheckpointError
from .errors import DestinationError as DestinationError
from .errors import MeasurementError as MeasurementError
from .errors import PlanError as PlanError
from .errors import ShardkitError as ShardkitError
from .errors import SizeError as SizeError
from .errors import SpaceError as SpaceError
from .errors import VerificationError as VerificationError
from .measure import LoadMeasurement as LoadMeasurement
from .measure import measure_load as measure_load
from .plan import Shard as Shard
from .plan import ShardPlan as ShardPlan
from .plan import plan_shards as plan_shards
from .run import Progress as Progress
from .tensor import TensorInfo as TensorInfo
from .verify import Verification as Verification
from .verify import verify_checkpoint as verify_checkpoint
from .write import ShardReport as ShardReport
from .write import shard_checkpoint as shard_checkpoint
