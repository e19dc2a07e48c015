"""Studies of the method as commands: arms that differ in a few settings, several seeds, one result page.

recipe (YAML) -> arms x seeds -> runs, which share what they can -> figures -> results.json, result page
"""
