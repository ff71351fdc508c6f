"""The graph passes. This folder is the package `decorr_fx.passes` and cannot be imported under another name."""

if __name__ != "decorr_fx.passes":
    raise ImportError("import decorr_fx.passes, not passes: the folder is a part of the package decorr_fx")
