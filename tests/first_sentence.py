"""How a documented first sentence reads: the form that the demo must learn, as its pass marks."""

import re

_FORM = re.compile(r"([A-Z][a-z]*)(?: [A-Z`'\"*(][\w.`'\"*-]*[,)]?)? [a-z]+[,.]?(?= |$)")

# The words that open at least four of the training side's first sentences in Python 3.11, less
# "This": PEP 257 asks for a phrase or command ("Do this"), and "This module is ..." opens files.
_OPENING_WORDS = """
A Abstract Acquire Add Adds Adjust An Append Applies Assert Asynchronous Base Bind Call Called
Change Check Class Clear Close Compare Compares Compile Compute Configure Connect Construct
Convert Converts Copy Create Creates Debug Decide Decode Decorator Default Define Delegate
Delete Describe Destroy Determine Display Do Dump Encode Ensure Equivalent Escape Exception
Execute Expand Extract Fail Failure Find Flush For Format Formatter Generate Generates Get Given
Guess Handle Handles Hook If Indicates Information Insert Install Instruct Interface Internal
Invoke Iterate Just Launcher List Load Log Make Mark Message Method Move Object Open Parse
Parses Perform Pop Print Process Produce Push Put Query Raise Raised Read Receive Recursively
Register Registers Release Remove Removes Report Represent Represents Request Reset Resolve
Retrieve Return Returns Run Schedule Send Set Sets Signals Simple Special Split Start Stop Store
Test The Toplevel Translate True Try Ttk Turn Unbind Value Wait Walk Whether Wrap Wrapper
Write
"""
OPENERS = frozenset(_OPENING_WORDS.split())


def begins_like_a_docstring(text: str) -> bool:
    """Whether `text` opens as a documented first sentence does: a test of form, not of truth.

    Its very first word must be one of `OPENERS`, and a word in lower case must follow it, with at
    most one name or quoted word between ("Return True if", "A ZipFile subclass"). Three in four of
    the library's own first sentences pass; source code, headings and bare names do not.
    """
    found = _FORM.match(text)
    return bool(found) and found[1] in OPENERS
