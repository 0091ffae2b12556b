"""Where it is placed: devices, their memory tiers, the links between them; the catalogue lies beside as TOML."""

from lp_plugin.hardware.cluster import Cluster
from lp_plugin.hardware.device import Device, Link, MemoryTier, slower_link

__all__ = ["Cluster", "Device", "Link", "MemoryTier", "slower_link"]
