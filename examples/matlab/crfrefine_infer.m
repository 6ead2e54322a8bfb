function labels = crfrefine_infer(logits, image, spacing, varargin)
%CRFREFINE_INFER Refine a network's logits with the dense CRF of crfrefine.
%   LABELS = CRFREFINE_INFER(LOGITS, IMAGE, SPACING) takes LOGITS (x, y, z, label), IMAGE (x, y, z) or (x, y, z, modality) and SPACING
%   [dx dy dz] in mm, and returns LABELS (x, y, z), from 0. Higher logits are better; the first label is the background.
%
%   CRFREFINE_INFER(..., NAME, VALUE) adds options of the command: "config", "params.toml" becomes --config params.toml. A VALUE of true
%   stands for a switch: "resample", true. Repeat "set" for several entries: "set", "bilateral.theta_alpha=3".
%
%   The command crfrefine must be on the path of the shell; "command", "/opt/bin/crfrefine" names another one. Files are written into a
%   temporary folder, which is removed again. For MATLAB and Octave, without toolboxes.

    if nargin < 3 || numel(spacing) ~= 3 || any(spacing <= 0)
        error("crfrefine:spacing", "spacing: expected three positive distances in mm");
    end
    grid = [size(logits, 1), size(logits, 2), size(logits, 3)];
    if size(logits, 4) < 2
        error("crfrefine:logits", "logits: expected (x, y, z, label) with at least two labels");
    end
    if ~isequal(grid, [size(image, 1), size(image, 2), size(image, 3)])
        error("crfrefine:grid", "image and logits are on different grids: %s and %s", mat2str(size(image)), mat2str(size(logits)));
    end
    command = "crfrefine";
    options = "";
    for k = 1:2:numel(varargin)
        name = char(varargin{k});
        value = varargin{k + 1};
        if strcmp(name, "command")
            command = value;
        elseif islogical(value)
            if value
                options = [char(options), ' --', name];
            end
        else
            if isnumeric(value)
                value = num2str(value, 17);
            end
            options = [char(options), ' --', name, ' ', quoted(value)];
        end
    end

    folder = tempname();
    mkdir(folder);
    cleaner = onCleanup(@() remove_folder(folder));
    files = {fullfile(folder, 'image.nii'), fullfile(folder, 'logits.nii'), fullfile(folder, 'refined.nii')};
    write_nifti(files{1}, single(image), spacing);
    write_nifti(files{2}, single(logits), spacing);
    line = sprintf('%s infer -q -i %s -p %s -o %s%s', quoted(command), quoted(files{1}), quoted(files{2}), quoted(files{3}), char(options));
    [status, text] = system([line, ' 2>&1']);
    if status ~= 0
        error("crfrefine:failed", "%s", strtrim(text));
    end
    labels = read_labels(files{3}, grid);
end

function text = quoted(value)
%QUOTED One word of the shell.
    text = ['''', strrep(char(value), '''', '''\'''''), ''''];
end

function remove_folder(folder)
    files = dir(folder);
    for k = 1:numel(files)
        if ~files(k).isdir
            delete(fullfile(folder, files(k).name));
        end
    end
    rmdir(folder);
end

function write_nifti(file, values, spacing)
%WRITE_NIFTI A NIfTI-1 file of float32 whose axes are those of the world, in mm.
    extents = [size(values, 1), size(values, 2), size(values, 3), size(values, 4)];
    id = fopen(file, 'w', 'ieee-le');
    if id < 0
        error("crfrefine:write", "%s: cannot be written", file);
    end
    closer = onCleanup(@() fclose(id));
    fwrite(id, 348, 'int32');
    fwrite(id, zeros(1, 36), 'uint8');
    fwrite(id, [3 + (extents(4) > 1), extents, 1, 1, 1], 'int16'); % dim
    fwrite(id, zeros(1, 14), 'uint8'); % intent
    fwrite(id, [16, 32, 0], 'int16'); % float32, its bits, first slice
    fwrite(id, [1, spacing(:)', 1, 1, 1, 1], 'single'); % pixdim
    fwrite(id, [352, 1, 0], 'single'); % where voxels begin, slope, intercept
    fwrite(id, 0, 'int16');
    fwrite(id, [0, 2], 'uint8'); % mm
    fwrite(id, zeros(1, 4 * 4 + 2 * 4 + 80 + 24), 'uint8');
    fwrite(id, [0, 2], 'int16'); % no quaternion; an affine
    fwrite(id, zeros(1, 6), 'single');
    fwrite(id, [spacing(1), 0, 0, 0, 0, spacing(2), 0, 0, 0, 0, spacing(3), 0], 'single');
    fwrite(id, zeros(1, 16), 'uint8');
    fwrite(id, [uint8('n+1'), 0, 0, 0, 0, 0], 'uint8');
    fwrite(id, values, 'single');
end

function labels = read_labels(file, grid)
%READ_LABELS The voxels of a label map that the command has written.
    id = fopen(file, 'r', 'ieee-le');
    if id < 0
        error("crfrefine:read", "%s: was not written", file);
    end
    closer = onCleanup(@() fclose(id));
    fseek(id, 70, 'bof');
    kind = fread(id, 1, 'int16');
    fseek(id, 108, 'bof');
    start = fread(id, 1, 'single');
    fseek(id, start, 'bof');
    switch kind
        case 2
            precision = 'uint8=>uint8';
        case 512
            precision = 'uint16=>uint16';
        otherwise
            error("crfrefine:read", "%s: values of type %d; expected labels", file, kind);
    end
    labels = reshape(fread(id, prod(grid), precision), grid);
end
