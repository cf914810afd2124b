"""The whole course as pages of HTML that anyone can read, without a kernel and without a network: `make site`.

`source` says which pages there are, `markup` makes Markdown and formulas into HTML, `chapter` a notebook, `living` the
widgets that need no kernel, `alt` puts pictures in words, `links` checks where everything leads, `build` writes it all.
"""
