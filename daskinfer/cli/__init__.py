"""The command ``daskinfer``: it parses a command line and a job file, calls the api, and prints the result.

The package owns the commands and their exit codes (``main``, ``exit_codes``), the flags that the api's options do not
declare (``options``), how they are shown (``help``) and their values parsed (``types``), the job file (``config``), the
object of ``--json`` (``result``), what is written to stderr (``logging``) in which words (``messages``), and the checks of
``daskinfer doctor`` (``doctor``, ``checks``). It must not know how anything is computed, and imports torch and Dask only
once the arguments are checked, so that a mistyped path or ``--help`` does not wait seconds for them.
"""
