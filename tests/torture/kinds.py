"""Every kind of trial, by the name that the command line knows it by."""

from tests.torture import (
    budgets,
    clusters,
    comparisons,
    estimates,
    flips,
    freeing,
    hubs,
    kills,
    mutations,
    pickles,
    places,
    quantized,
    races,
    space,
)

KINDS = {
    "kills": kills.RANDOM, "kills-at-calls": kills.CHOSEN, "free-source": freeing.FREED,
    "small-disk": space.BEFORE, "full-disk": space.MEANWHILE, "full-disk-calls": space.CALLS,
    "mutations": mutations.MUTATED, "monsters": mutations.MONSTROUS,
    "flips": flips.FLIPS, "pickles": pickles.PICKLES, "races": races.RACES,
    "places": places.ODD, "fallbacks": places.FALLBACKS,
    "hub-trips": hubs.TRIPS, "hub-kills": hubs.KILLED,
    "cancels": places.CANCELS, "interrupts": places.INTERRUPTS,
    "budgets": budgets.BUDGETS, "estimates": estimates.ESTIMATES, "quantized": quantized.QUANTIZED,
    "cluster-kills": clusters.KILLED,
    "same-twice": comparisons.SAME, "same-twice-auto": comparisons.SAME_UNTIL,
    "slowdowns": comparisons.SLOWED, "slowdowns-auto": comparisons.SLOWED_UNTIL,
}  # fmt: skip
