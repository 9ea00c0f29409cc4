"""The network and the digits that `daskinfer demo` runs on."""
