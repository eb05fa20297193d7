"""One honest load, measured in a fresh process."""

from shardkit.measure.environment import Environment
from shardkit.measure.launch import measure_load
from shardkit.measure.measurement import LoadMeasurement, MemoryCurve, Phase
from shardkit.measure.page_cache import CacheState

__all__ = ["CacheState", "Environment", "LoadMeasurement", "MemoryCurve", "Phase", "measure_load"]
