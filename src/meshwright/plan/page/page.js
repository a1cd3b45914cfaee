"use strict";
// The page: each section from its part of the data.

heading();
headline();
timeSection();
warningsSection();
timelineSection();
memorySection();
meshSection();
communicationSection();
sourceSection();
machineSection();
