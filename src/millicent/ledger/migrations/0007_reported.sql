-- What a provider says that it charges for an attempt, beside what we make of it.

ALTER TABLE attempts ADD COLUMN reported_nanousd INTEGER;
