"""Adapters to the engines people already run; imported as ``lp_plugin.integrations``.

An adapter extracts a profile or applies a plan; it never decides where a layer goes.
"""

if __name__ == "integrations":
    raise ImportError("import lp_plugin.integrations, not integrations: the modules must exist only once")
