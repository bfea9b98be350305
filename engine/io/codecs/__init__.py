"""One module a family of formats: `header(file)`, `read(data, header, notice)` and, where it is written, `write(...)`.

`engine.io.formats` is the table that names them.
"""
