"""The book: static pages about the operators, the families and what a beginner needs to read them.

    refllm learn book                 writes docs/book/, which `make test` makes again and compares

Every line of code on a page is read from the file that it stands in, every number comes from code that ran while the
page was made, and every formula is evaluated: a page whose three columns disagree is not written.
"""
