__version__: str

from . import errors as errors
from .app import ShardApp as ShardApp
from .base.jobs import Progress as Progress
from .checkpoint.checkpoint import Checkpoint as Checkpoint
from .checkpoint.estimate import Estimate as Estimate
from .compare.comparison import Comparison as Comparison
from .compare.comparison import merge_comparisons as merge_comparisons
from .compare.experiment import compare_loads as compare_loads
from .compare.fit import MemoryFloor as MemoryFloor
from .compare.fit import minimum_memory as minimum_memory
from .demo import make_demo_checkpoint as make_demo_checkpoint
from .formats.tensor import TensorInfo as TensorInfo
from .load.load_model import load_model as load_model
from .measure.article_stack import article_stack as article_stack
from .measure.launch import measure_load as measure_load
from .measure.measurement import LoadMeasurement as LoadMeasurement
from .plan.plan import Shard as Shard
from .plan.plan import ShardPlan as ShardPlan
from .plan.plan import plan_shards as plan_shards
from .shard.engine import shard_checkpoint as shard_checkpoint
from .shard.engine import shard_on_hub as shard_on_hub
from .shard.push import push_checkpoint as push_checkpoint
from .shard.report import ShardReport as ShardReport
from .shard.report import Verification as Verification
from .shard.verify import verify_checkpoint as verify_checkpoint
from .show.progress import ProgressBar as ProgressBar
