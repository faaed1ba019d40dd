"""The files of a new plug-in project, as Jinja templates: those of every kind, and two for each kind."""
