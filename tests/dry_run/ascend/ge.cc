// The classes of GE, CANN's graph engine, of which MindSpore makes objects to describe shapes and to ask whether an operator
// exists: here every one does. Compiled with the old std::string, as CANN is.
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ge {
enum Format : int {};
enum DataType : int {};

class AscendString {
 public:
  AscendString(const char *text);
  const char *GetString() const;
  std::shared_ptr<std::string> text;
};
AscendString::AscendString(const char *text) : text(std::make_shared<std::string>(text ? text : "")) {}
const char *AscendString::GetString() const { return text ? text->c_str() : ""; }

using Dims = std::vector<int64_t>;
class Shape {
 public:
  Shape();
  explicit Shape(const Dims &);
  size_t GetDimNum() const;
  int64_t GetDim(size_t) const;
  Dims GetDims() const;
  int64_t GetShapeSize() const;
  unsigned SetDim(size_t, int64_t);
  std::shared_ptr<Dims> dims;
};
Shape::Shape() : dims(std::make_shared<Dims>()) {}
Shape::Shape(const Dims &dims) : dims(std::make_shared<Dims>(dims)) {}
size_t Shape::GetDimNum() const { return dims->size(); }
int64_t Shape::GetDim(size_t i) const { return (*dims)[i]; }
Dims Shape::GetDims() const { return *dims; }
int64_t Shape::GetShapeSize() const {
  int64_t n = 1;
  for (auto dim : *dims) n *= dim;
  return n;
}
unsigned Shape::SetDim(size_t i, int64_t value) {
  if (i < dims->size()) (*dims)[i] = value;
  return 0;
}

struct Desc {
  Shape shape;
  Format format{};
  DataType type{};
};
class TensorDesc {
 public:
  TensorDesc();
  TensorDesc(const TensorDesc &);
  TensorDesc(TensorDesc &&);
  TensorDesc(Shape, Format, DataType);
  Shape GetShape() const;
  DataType GetDataType() const;
  Format GetFormat() const;
  void SetShape(const Shape &);
  void SetDataType(DataType);
  void SetFormat(Format);
  std::shared_ptr<Desc> desc;
};
TensorDesc::TensorDesc() : desc(std::make_shared<Desc>()) {}
TensorDesc::TensorDesc(const TensorDesc &other) : desc(std::make_shared<Desc>(*other.desc)) {}
TensorDesc::TensorDesc(TensorDesc &&other) : desc(other.desc) {}
TensorDesc::TensorDesc(Shape shape, Format format, DataType type) : desc(new Desc{shape, format, type}) {}
Shape TensorDesc::GetShape() const { return desc->shape; }
DataType TensorDesc::GetDataType() const { return desc->type; }
Format TensorDesc::GetFormat() const { return desc->format; }
void TensorDesc::SetShape(const Shape &shape) { desc->shape = shape; }
void TensorDesc::SetDataType(DataType type) { desc->type = type; }
void TensorDesc::SetFormat(Format format) { desc->format = format; }

class Tensor {
 public:
  Tensor();
  explicit Tensor(const TensorDesc &);
  Tensor(const TensorDesc &, const uint8_t *, size_t);
  std::shared_ptr<int> data;
};
Tensor::Tensor() {}
Tensor::Tensor(const TensorDesc &) {}
Tensor::Tensor(const TensorDesc &, const uint8_t *, size_t) {}

class Operator {
 public:
  Operator() = default;
  explicit Operator(const std::string &);
  Operator(const std::string &, const std::string &);
  explicit Operator(const char *);
  Operator(const char *, const char *);
  Operator(const AscendString &, const AscendString &);
  virtual ~Operator() = default;
  std::string GetName() const;
  std::string GetOpType() const;
  std::shared_ptr<int> data;
};
Operator::Operator(const std::string &) {}
Operator::Operator(const std::string &, const std::string &) {}
Operator::Operator(const char *) {}
Operator::Operator(const char *, const char *) {}
Operator::Operator(const AscendString &, const AscendString &) {}
std::string Operator::GetName() const { return "operator"; }
std::string Operator::GetOpType() const { return "operator"; }

class OperatorFactory {
 public:
  static Operator CreateOperator(const char *, const char *);
  static Operator CreateOperator(const std::string &, const std::string &);
  static bool IsExistOp(const char *);
  static bool IsExistOp(const std::string &);
};
Operator OperatorFactory::CreateOperator(const char *, const char *) { return Operator(); }
Operator OperatorFactory::CreateOperator(const std::string &, const std::string &) { return Operator(); }
bool OperatorFactory::IsExistOp(const char *) { return true; }
bool OperatorFactory::IsExistOp(const std::string &) { return true; }
}  // namespace ge
