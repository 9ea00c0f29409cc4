"""What is seen of a run: the events that it emits, and everything that is made of them.

This package owns the events (``events``), what each device did (``device_stats``, ``timeline``), the status while a run goes
on (``status``) and the report after it (``report``), with its line of advice (``verdict``) and where it comes from
(``provenance``); and every way to show them: ``progress`` in terminals (``terminal``), notebooks and logs, ``dashboard`` on
Dask's own page, ``html_report`` and ``figure`` for the report, drawn from the numbers of ``charts``. All pictures take their
colours from ``palette``: a hue is a device, a grey or a hatch is what it does.

It must not know how rows are computed, planned or stored: it sees nothing but events, in the order in which they are sent.
A display that fails is disabled and never stops a computation. Libraries that draw (bokeh, matplotlib, rich) are imported
only when something is drawn.
"""
