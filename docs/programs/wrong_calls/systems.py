"""Systems and tracks.

`circle` are 60 points around a circle of radius 100 m, and `square` four corners.
`track(text)` reads what was written into a file `track.csv`.
"""

import json
import pathlib

import numpy as np

import diffprog as dp
from diffprog.systems import Track


angle = np.linspace(0.0, 2 * np.pi, 60, endpoint=False)
circle = 100.0 * np.stack([np.cos(angle), np.sin(angle)], 1)
square = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
names = "x_m,y_m,w_tr_right_m,w_tr_left_m\n"


def track(text, **options):
    pathlib.Path("track.csv").write_text(text)
    return Track.from_csv("track.csv", **options)


def track_of(columns):
    pathlib.Path("track.json").write_text(json.dumps(columns))
    return Track.from_json("track.json")


def hairpin(num):
    turn = np.linspace(0.0, np.pi, num)[1:-1]
    bend = np.stack([40 + 4 * np.sin(turn), 4 - 4 * np.cos(turn)], 1)
    there = np.stack([np.arange(0.0, 41.0), np.zeros(41)], 1)
    return np.concatenate([there, bend, there[::-1] + [0.0, 8.0]])


# %% ### Systems

# %% A step takes positive seconds.
dp.systems.Pendulum(dt=0.0)

# %% [slow] Give objects: a car such as `Car.miniature()`, and a track.
dp.systems.Race(dp.systems.Car, Track.circle())

# %% ### Tracks of points

# %% Give numbers.
Track.from_waypoints(square.astype(str), 0.1)

# %% Write numbers, not strings of them.
Track.from_waypoints([["0", "0"], ["1", "0"], ["1", "1"], ["0", "1"]], 0.1)

# %% Give rows of equal length.
Track.from_waypoints([[0.0, 0.0], [1.0]], 0.1)

# %% A width is finite.
Track.from_waypoints(square, np.inf)

# %% Drop rows without numbers.
Track.from_waypoints(np.concatenate([square, [[np.nan, 0.0]]]), 0.1)

# %% Points have two columns, x and y.
Track.from_waypoints(np.zeros((4, 3)), 0.1)

# %% Add points.
Track.from_waypoints(square[:3], 0.1)

# %% A closed track does not repeat its first point.
Track.from_waypoints(np.concatenate([square[:3], square[:1]]), 0.1)

# %% Drop one of two equal rows.
Track.from_waypoints(np.concatenate([square[:1], square]), 0.1)

# %% Coordinates of a map need float64.
Track.from_waypoints((circle + [4.5e5, 5.7e6]).astype(np.float32), 3.0)

# %% Give the width once.
Track.from_waypoints(circle)

# %% Give both sides.
Track.from_waypoints(circle, left=3.0)

# %% Give one width, or one for every point.
Track.from_waypoints(circle, left=3.0, right=np.ones(5))

# %% Widths count from the center line, on both sides.
Track.from_waypoints(circle, left=-3.0, right=3.0)

# %% Center and borders have one row for each place.
Track.from_borders(circle, 1.1 * circle[1:], 0.9 * circle)

# %% Drop the last row, which repeats the first.
Track.from_waypoints(np.concatenate([circle, [[101.5, 0.0]]]), 3.0)

# %% Drop the rows past the start.
Track.from_waypoints(np.concatenate([circle, circle[:3] * 1.001]), 3.0)

# %% Bring the rows into the order of travel.
Track.from_waypoints(circle[[*range(10), 12, 10, 11, *range(13, 60)]], 3.0)

# %% Keep one lap.
Track.from_waypoints(np.concatenate([circle, circle]), 3.0)

# %% [slow] Exchange `left` and `right`, or reverse all rows.
Track.from_borders(circle, 1.1 * circle, 0.9 * circle)

# %% A border far inside of a corner runs backwards: lower the width.
Track.from_waypoints(circle, 190.0)

# %% Widths that begin at once swing below 0 between rows: add rows there.
Track.from_waypoints(circle, np.where(np.arange(60) < 30, 0.0, 5.0))

# %% Add rows in sharp corners: `spacing` does.
Track.from_waypoints(hairpin(3), 7.0, closed=False)

# %% Lower the radius.
Track.oval(straight=-50.0)

# %% ### Tracks of files

# %% Give the path of a file.
Track.from_csv("nowhere.csv")

# %% Name the columns in the header, or give the width.
track("x_m,y_m\n0,0\n1,0\n1,1\n0,1\n")

# %% The header that it asks for keeps the order of the file.
track("x,y,width_left,width_right\n0,0,4,5\n1,0,4,5\n1,1,4,5\n0,1,4,5\n")

# %% Name the columns, or separate cells by semicolons.
track("100,000,0,000\n0,000,100,000\n-100,000,0,000\n0,000,-100,000\n")

# %% The same where it is found out later.
track("0,2,5,5\n10,2,5,5\n20,2,5,5\n15,2,5,5\n30,2,5,5\n40,2,5,5\n", closed=False)

# %% Every row has the cells that the header names.
track(names + "0,0,5\n")

# %% Write numbers without separators of thousands.
track(names + "0,zero,5,5\n")

# %% Write all numbers with points, or all with commas.
track("x_m;y_m;w_tr_right_m;w_tr_left_m\n0,5;1;5;5\n1.5;1;5;5\n")

# %% Write decimal points where commas may be read in two ways.
track("x_m;y_m;w_tr_right_m;w_tr_left_m\n950;2;5;5\n1,050;5;5;5\n")

# %% Write valid JSON.
pathlib.Path("track.json").write_text("{")
Track.from_json("track.json")

# %% Give the columns that are missing.
track_of({"X": [0.0, 1.0]})

# %% Columns have one number for every point.
track_of({"X": [0.0, 1.0], **dict.fromkeys(["Y", "X_i", "Y_i", "X_o", "Y_o"], [0.0])})

# %% Keys of a column are indices.
track_of(dict.fromkeys(["X", "Y", "X_i", "Y_i", "X_o", "Y_o"], {"first": 0.0}))

# %% A column is a list of numbers.
track_of(dict.fromkeys(["X", "Y", "X_i", "Y_i", "X_o", "Y_o"], 0.0))

# %% Write numbers.
track_of(dict.fromkeys(["X", "Y", "X_i", "Y_i", "X_o", "Y_o"], [0.0, "one"]))
