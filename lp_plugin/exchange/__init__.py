"""What partitions have in common across engines; the texts are the business of ``lp_plugin.integrations``."""
