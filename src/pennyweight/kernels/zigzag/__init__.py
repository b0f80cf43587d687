"""y = W x with zigzag 4-bit weights (formats/zigzag.py), reading only the columns whose input is large enough.

The backends do the same four steps on the device, and the host never learns how many columns were kept:

count, scatter   the columns with |x| * importance > threshold, ascending, beside their x: a count per block of x, then
                 every block places its own behind those before it
multiply         a program is a band of rows times a slice of the kept columns, and writes float32 sums of its own
reduce           the slices of a row are added in a fixed order: no atomics on floats, the same bits every time

Bands alone are too few programs for a GPU, slices alone leave as many sums to add as were saved. Structure after SpQt
(arXiv:2511.04477); departures: fixed-point atomics became the two stages, and no column is dropped to round the list.
"""
